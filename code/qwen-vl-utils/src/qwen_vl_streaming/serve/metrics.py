"""What operators see at /metrics, in Prometheus' format. Knows nothing about sockets and models."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Each with the label `model`, except where the text says otherwise."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def make(kind, name: str, text: str, labels: tuple[str, ...] = ("model",), **options):
            return kind(f"qwen_vl_{name}", text, labels, registry=self.registry, **options)

        self.ttft = make(Histogram, "ttft_seconds", "From the first complete clip to the first token", buckets=SECONDS)
        self.tpot = make(Histogram, "tpot_seconds", "From one token of a slot to the next", buckets=SECONDS)
        self.jitter = make(
            Histogram, "jitter_seconds", "Difference between one time per output token and the next", buckets=SECONDS
        )
        self.age = make(
            Histogram, "age_seconds", "From the newest frame's arrival to a token that saw it", buckets=SECONDS
        )
        self.share = make(
            Histogram,
            "server_share_seconds",
            "Share of a token's age outside of the model: decoding its frame, and sending it",
            buckets=(0.0005, 0.001, 0.002, *SECONDS),
        )
        self.misses = make(Counter, "deadline_misses", "Slots not finished when the next clip was complete")
        self.tokens = make(Counter, "tokens", "Tokens written, without end-of-slot tokens")
        self.sessions = make(Gauge, "sessions", "Sessions that run now")
        self.responses = make(Counter, "responses", "Responses that are over, by status", ("model", "status"))
        self.queue = make(Gauge, "queue", "Viewers waiting for a session (no label)", ())
        self.viewers = make(Gauge, "viewers", "Open connections (no label)", ())
        self.frames = make(Counter, "frames", "Frames of clients: used, dropped or refused (no model)", ("outcome",))

    def text(self) -> bytes:
        return generate_latest(self.registry)
