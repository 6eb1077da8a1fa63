// A worker that only waits: browsers slow down the timers of a page in the background, but not those of its workers.
onmessage = ({ data: { id, milliseconds } }) => setTimeout(() => postMessage({ id }), milliseconds);
