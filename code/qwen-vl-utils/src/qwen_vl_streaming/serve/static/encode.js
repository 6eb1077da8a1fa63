// A worker that makes a JPEG of a picture: in the background, browsers do so once a second for a page, but not for workers.
onmessage = async ({ data: { id, picture, quality } }) => {
  try {
    const canvas = new OffscreenCanvas(picture.width, picture.height);
    canvas.getContext("2d", { alpha: false }).drawImage(picture, 0, 0);
    picture.close();
    postMessage({ id, jpeg: await canvas.convertToBlob({ type: "image/jpeg", quality }) });
  } catch (error) {
    postMessage({ id, error: String(error) }); // errors of an async function do not reach the page by themselves
  }
};
