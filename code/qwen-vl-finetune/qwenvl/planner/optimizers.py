"""Memory of the optimizers that `--optim` names, per trained parameter."""

from qwen_vl_streaming.common.errors import InputError

ADAM = 8.0
"""Bytes of Adam's two moments in float32."""
STATES = {
    # DeepSpeed gives an optimizer one flat tensor, so Adafactor's second moment is not factored.
    ADAM: "adamw_torch adamw_torch_fused paged_adamw_32bit",
    12.0: "ademamix paged_ademamix_32bit",
    4.0: "adafactor adagrad rmsprop rmsprop_bnb rmsprop_bnb_32bit lion_32bit paged_lion_32bit",
    3.0: "ademamix_8bit paged_ademamix_8bit",
    2.0: "adamw_8bit adamw_bnb_8bit paged_adamw_8bit",
    1.0: "rmsprop_bnb_8bit lion_8bit paged_lion_8bit",
    0.0: "sgd",
}
"""Bytes of the states, besides the float32 master weights. Paged states count as GPU memory."""
BYTES = {name: size for size, names in STATES.items() for name in names.split()}


def state_bytes(optimizer: str, arguments: str = "") -> float:
    """Bytes of the states of `--optim` and `--optim_args`. Raises InputError for an optimizer that is not known."""
    if optimizer not in BYTES:
        raise InputError(
            f"--optim {optimizer}: the planner does not know its memory: choose one of {', '.join(sorted(BYTES))}; or "
            "give --no_plan to train with your own flags"
        )
    words = [word.partition("=") for word in arguments.replace(" ", "").lower().split(",")]
    buffers = {
        name
        for name, _, value in words
        if (name == "momentum" and value.strip("0.")) or (name == "centered" and value == "true")
    }
    return BYTES[optimizer] + 4.0 * len(buffers)
