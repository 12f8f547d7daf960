"""General text: reading it, and cutting it into windows of tokens."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from flow_lightning.data.texts import TextWindows, read_texts
from tests.language import END, SENTENCES, tiny_tokenizer

TEXT = " ".join(SENTENCES)


def test_files_are_read_in_order(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"Größe {name}", encoding="utf-8")
    assert read_texts([str(tmp_path / "b.txt"), "a.txt"]) == ["Größe b.txt", "Größe a.txt"]


def test_packaged_text_is_prose_and_always_the_same():
    first, second = read_texts(["packaged", "packaged"])
    assert first == second
    assert len(first) > 300_000 and "statement" in first


def test_a_missing_file_is_named_with_its_place(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "absent.txt")):
        read_texts(["absent.txt"])


@pytest.mark.parametrize(("content", "message"), [(b" \n", "is empty"), (b"\xff\xfe\x00", "not UTF-8")])
def test_unusable_files_are_refused(tmp_path, content, message):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"text\.txt.*{message}"):
        read_texts(["text.txt"])


def test_windows_hold_every_token_once():
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    windows = TextWindows([TEXT], tokenizer, window=7)
    samples = [windows[i] for i in range(len(windows))]
    expected = len(ids) - (len(ids) % 7 == 1)
    assert torch.cat([sample["input_ids"] for sample in samples]).tolist() == ids[:expected]
    assert windows.lengths.tolist() == [len(sample["input_ids"]) for sample in samples]
    assert set(windows.lengths[:-1].tolist()) == {7}
    assert [sample["index"] for sample in samples] == list(range(len(windows)))
    assert {sample["prompt_length"] for sample in samples} == {1}
    assert samples[0]["input_ids"].dtype == torch.int64


def test_windows_do_not_go_across_texts_and_a_single_token_is_dropped():
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    windows = TextWindows([TEXT, TEXT], tokenizer, window=len(ids) - 1)
    assert windows.lengths.tolist() == [len(ids) - 1] * 2
    assert torch.equal(windows[0]["input_ids"], windows[1]["input_ids"])


def test_each_window_starts_as_the_tokenizer_starts_a_text():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = END
    ids = tokenizer(TEXT)["input_ids"]
    assert TextWindows([TEXT], tokenizer, window=8)[1]["input_ids"].tolist() == ids[8:16]  # it does not
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.eos_token_id)]
    )
    windows = TextWindows([TEXT], tokenizer, window=8)
    assert windows[1]["input_ids"].tolist() == [tokenizer.bos_token_id, *ids[7:14]]


def test_tokens_can_be_limited():
    windows = TextWindows([TEXT, TEXT], tiny_tokenizer(), window=10, limit_tokens=24)
    assert windows.lengths.tolist() == [10, 10, 4]
    assert TextWindows([TEXT], tiny_tokenizer(), window=10, limit_tokens=21).lengths.tolist() == [10, 10]


def test_texts_without_two_tokens_are_refused():
    with pytest.raises(ValueError, match="fewer than 2"):
        TextWindows([""], tiny_tokenizer())
