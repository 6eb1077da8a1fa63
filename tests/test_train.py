"""Training: the contents of samples and batches, bad samples, and arguments that are refused."""

import time
from types import SimpleNamespace

import pytest
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.loading import load_model
from qwen_vl_streaming.model.prompts import QUESTIONS, load_processor, make_template
from qwen_vl_streaming.timeline.attention import make_mask
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwenvl.arguments import DataArguments, ModelArguments
from qwenvl.batches import collate, collate_for_trainer, pack
from qwenvl.data import IGNORED, StreamingDataset
from qwenvl.rows import read_rows
from qwenvl.trainer import StreamingTrainer
from qwenvl.training_arguments import SftArguments
from torch.utils._python_dispatch import TorchDispatchMode
from training import refused
from transformers import Trainer, TrainingArguments

SEED = time.time_ns() % 100_000


def dataset(made, variant, **changes):
    checkpoint, data = made
    arguments = {"budget": PixelBudget(3136, 3136), "max_length": 4096, **changes}
    processor = load_processor(checkpoint)
    return StreamingDataset(read_rows(data), data.parent, processor, 2, VARIANTS[variant], "wait-3", **arguments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_labels_spell_the_caption(made, variant):
    """The labels are the tokens of the caption in order, at the rows that produce them."""
    samples = dataset(made, variant)
    for sample, row in zip((samples[i] for i in range(3)), samples.rows, strict=False):
        labels = sample.labels[sample.labels != IGNORED]
        assert samples.processor.tokenizer.decode(labels) == row["human_caption"] + "<|im_end|>"
        assert int((sample.input_ids == samples.templates[0].video).sum()) * 4 == len(sample.pixel_values)
        assert any(
            sample.input_ids[: len(template.prompt)].tolist() == list(template.prompt) for template in samples.templates
        )


def test_questions_are_the_papers_and_a_sample_keeps_its_own(made):
    samples = dataset(made, "group")
    assert samples.templates == [make_template(samples.processor, question) for question in QUESTIONS]
    assert torch.equal(samples[0].input_ids, samples[0].input_ids)
    assert len({len(samples[i].input_ids[:30].unique()) for i in range(8)}) > 1


@pytest.mark.parametrize("question", [*QUESTIONS, "\nWhat?", " what", "\u0301x", "用户 asks", "a <b>", "Q?\n\n"])
def test_a_question_has_the_tokens_of_the_chat_template(made, question):
    processor = load_processor(made[0])
    messages = [{"role": "user", "content": [{"type": "text", "text": question}, {"type": "video"}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    template = make_template(processor, question)
    whole = [*template.prompt, template.video, *template.tail, *template.header]
    assert whole == processor.tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("special", ["<|video_pad|>", "<|im_end|>", "<|vision_start|><|video_pad|><|vision_end|>"])
def test_a_special_token_in_a_question_is_text(made, special):
    processor = load_processor(made[0])
    plain, odd = (make_template(processor, question) for question in ("What is it?", f"What is {special} it?"))
    assert special in processor.tokenizer.decode(odd.prompt)
    for token in processor.tokenizer.added_tokens_decoder:
        assert odd.prompt.count(token) == plain.prompt.count(token)
    assert (odd.tail, odd.header, odd.video) == (plain.tail, plain.header, plain.video)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_equals_its_samples(made, variant):
    """Loss and gradients of a batch of 4, padded and packed, against the four samples one by one."""
    samples = [dataset(made, variant)[i] for i in range(4)]
    parallel = VARIANTS[variant].parallel
    total = sum(int((sample.labels != IGNORED).sum()) for sample in samples)

    def gradients(batches, pack_tokens=0):
        model = load_model(made[0], "sdpa", torch.float32)
        loss = 0.0
        for batch in (collate(samples, pack_tokens) for samples in batches):
            assert not batch.pop("tally")["bad"]
            flags = batch.pop("visual"), batch.pop("text")
            mask = make_mask(*flags, parallel, "sdpa", batch.pop("sample", None))
            part = model(**batch, attention_mask=mask, num_items_in_batch=total).loss
            part.backward()
            loss += part.item()
        return loss, [parameter.grad for parameter in model.parameters()]

    loss_alone, grads_alone = gradients([[sample] for sample in samples])
    longest = max(len(sample.input_ids) for sample in samples)
    for pack_tokens in (0, 2 * longest + 5, 4 * longest):
        loss, grads = gradients([samples], pack_tokens)
        assert abs(loss - loss_alone) < 1e-5
        for a, b in zip(grads, grads_alone, strict=True):
            assert torch.allclose(a, b, atol=1e-5, rtol=1e-3)


class Values(TorchDispatchMode):
    """Lists operations whose result depends on the values of a tensor, so that the host waits for the GPU."""

    names = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "masked_scatter",
        "repeat_interleave",
        "unique",
        "equal",
    )

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        indexes = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else []
        masks = [part for part in indexes if isinstance(part, torch.Tensor) and part.dtype == torch.bool]
        if masks or any(part in name for part in self.names):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("pack_tokens", [0, 400])
def test_a_pass_reads_no_values(made, pack_tokens):
    """Else the host waits for the GPU, which then waits for the host. Mask, forward and backward pass."""
    model = load_model(made[0], "sdpa", torch.float32).train()
    batch = collate_for_trainer([dataset(made, "group")[i] for i in range(2)], pack_tokens)
    grids = batch.pop("video_grid_thw").tensor
    batch |= {"pixel_values_videos": batch["pixel_values_videos"].tensor, "video_grid_thw": grids}
    layout = model._make_tower_layout(grids.tolist())  # computed on the host
    model._make_tower_layout = lambda *_, **__: layout
    del batch["tally"]
    flags = batch.pop("visual"), batch.pop("text"), True
    with Values() as values:
        make_mask(*flags, "flex_attention", sample := batch.pop("sample", None))
        mask = make_mask(*flags, "sdpa", sample)
        loss = model(**batch, attention_mask=mask, num_items_in_batch=torch.tensor(7)).loss
        loss.backward()
        assert not values.found
        del batch["score"]
        again = model(**batch, attention_mask=mask, num_items_in_batch=torch.tensor(7)).loss
        assert values.found  # flags of rows instead of their indices
    assert again == loss


def test_packing_fills_rows_and_loses_nothing(made):
    samples = [dataset(made, "group")[i] for i in range(8)]
    longest = max(len(sample.input_ids) for sample in samples)
    rows = pack(samples, 2 * longest)
    assert len(rows) <= 4 and sorted(map(id, samples)) == sorted(id(sample) for row in rows for sample in row)
    assert all(sum(len(sample.input_ids) for sample in row) <= 2 * longest for row in rows)
    batch = collate(samples, 2 * longest)
    assert batch["input_ids"].shape == (len(rows), 2 * longest)
    assert int((batch["labels"] != IGNORED).sum()) == sum(int((s.labels != IGNORED).sum()) for s in samples)


def test_a_bad_sample_is_skipped_with_its_reason(made):
    """It has no labels, adds nothing to the loss, and is not replaced by another sample."""
    samples = dataset(made, "group")
    good = samples[1]
    samples.rows[0] = {**samples.rows[0], "video_path": "missing.mp4"}
    samples.rows[2] = {**samples.rows[2], "human_caption": "  "}
    for index, reason in ((0, "missing.mp4"), (2, "no tokens")):
        bad = samples[index]
        assert (bad.labels == IGNORED).all() and reason in bad.bad[1]
    for path in ("a" * 300, "a/" * 3000):  # longer than a name or a path may be
        samples.rows[3] = {**samples.rows[3], "video_path": path}
        assert "cannot be read (File name too long)" in samples[3].bad[1]
    for length, reason in ((40, "maximum length 40"), (20, "more than the 5 that the model supports")):
        assert reason in dataset(made, "group", max_length=length)[0].bad[1]
    batch = collate([samples[0], good])
    assert [video_id for video_id, _ in batch["tally"]["bad"]] == [samples.rows[0]["video_id"]]
    assert int((batch["labels"] != IGNORED).sum()) == int((good.labels != IGNORED).sum())


def test_invalid_arguments_are_refused_in_one_line(made, tmp_path, capsys, monkeypatch):
    checkpoint, data = made
    common = ["--train_data", str(data), "--output_dir", str(tmp_path / "out"), "--use_cpu", "True", "--bf16", "False"]
    model = ["--model_name_or_path", str(checkpoint)]
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "half.jsonl").write_text('{"video_id": "1"')
    (tmp_path / "zero.json").write_text("{")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"streaming_variant": "gap"}')
    group = ["--variant", "group"]
    for arguments, reason in (
        ([*common, *model, "--variant", "grup"], "unknown variant 'grup'"),
        ([*common, *model, *group, "--wait_k", "0"], "--wait_k 0"),
        ([*common, *model, *group, "--attention", "flash_attention_2"], "does not support the streaming mask"),
        ([*common, *model, *group, "--tune_mm_llm", "0", "--tune_mm_mlp", "0"], "there is nothing to train"),
        ([*common, *model, *group, "--train_data", str(tmp_path / "none.jsonl")], "none.jsonl"),
        ([*common, *model, *group, "--train_data", str(tmp_path / "empty.jsonl")], "is empty"),
        ([*common, *model, *group, "--train_data", str(tmp_path / "half.jsonl")], "half.jsonl, line 1"),
        ([*common, *model, *group, "--deepspeed", str(tmp_path / "zero.json")], "not valid JSON"),
        ([*common, *model, *group, "--output_dir", str(tmp_path / "other")], "trained as gap, not group"),
        ([*common, *group, "--model_name_or_path", str(tmp_path)], "has no config.json"),
        ([*common, *model, *group, "--no_such_flag", "1"], "no_such_flag"),
    ):
        assert reason in refused(arguments, capsys, monkeypatch)
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize(
    "variant,cuda,packed,chosen",
    [
        ("group", True, False, "flex_attention"),
        ("interleave", True, False, "sdpa"),
        ("interleave", True, True, "flex_attention"),
        ("group", False, True, "sdpa"),
    ],
)
def test_a_gpu_uses_flex_attention_for_every_mask(made, variant, cuda, packed, chosen):
    arguments = ModelArguments(model_name_or_path=str(made[0]), variant=variant)
    assert arguments.choose_attention(cuda, packed) == chosen


def test_default_pixel_budget(made):
    assert DataArguments(train_data=str(made[1])).pixel_budget == PixelBudget()
    with pytest.raises(InputError, match="nowhere"):
        DataArguments(train_data="nowhere.jsonl")


@pytest.mark.parametrize(
    "workers, steps, samples, given, expected",
    [(4, 16, 1, None, 4), (4, 4, 1, None, 2), (3, 100, 1, None, 6), (2, 16, 4, None, 2), (1, 16, 4, None, 4),
     (4, 16, 99, None, 2), (4, 16, 1, 1, 1), (0, 16, 1, None, 1)],
)  # fmt: skip
def test_workers_read_a_whole_step_ahead(monkeypatch, workers, steps, samples, given, expected):
    loader = SimpleNamespace(base_dataloader=SimpleNamespace(prefetch_factor=1))
    monkeypatch.setattr(Trainer, "get_train_dataloader", lambda trainer: loader)
    trainer = StreamingTrainer.__new__(StreamingTrainer)
    trainer.args = SimpleNamespace(
        dataloader_num_workers=workers,
        gradient_accumulation_steps=steps,
        per_device_train_batch_size=samples,
        dataloader_prefetch_factor=given,
    )
    assert trainer.get_train_dataloader().base_dataloader.prefetch_factor == expected


def test_deepspeed_does_not_time_passes(monkeypatch, tmp_path):
    """Its throughput timer makes the host wait for the GPU, unless the configuration asks for it."""
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.setenv("RANK", "0")
    for given in ({}, {"timers": {"throughput": {"enabled": True}}}):
        config = dict(given)
        monkeypatch.setattr(
            TrainingArguments,
            "__post_init__",
            lambda self, config=config: setattr(
                self, "hf_deepspeed_config", SimpleNamespace(config=config, mismatches=[])
            ),
        )
        SftArguments(output_dir=str(tmp_path), deepspeed=str(tmp_path / "zero.json"), use_cpu=True, report_to="none")
        assert config == (given or {"timers": {"throughput": {"enabled": False}}})
