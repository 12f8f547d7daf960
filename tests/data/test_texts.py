"""General text: reading it, and cutting it into windows of tokens."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from flow_lightning.data.texts import TextWindows, read_texts
from tests.language import END, SENTENCES, TOKENIZER, tiny_tokenizer

TEXT = " ".join(SENTENCES)
IDS = TOKENIZER(TEXT)["input_ids"]


def test_files_are_read_in_order(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"Größe {name}", encoding="utf-8")
    assert read_texts([str(tmp_path / "b.txt"), "a.txt"]) == ["Größe b.txt", "Größe a.txt"]


def test_packaged_text_is_prose_and_always_the_same():
    first, second = read_texts(["packaged", "packaged"])
    assert first == second
    assert len(first) > 300_000 and "statement" in first


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", r"{tmp_path}/absent'"), ("empty", "empty is empty"), ("latin", "latin is not UTF-8")],
)
def test_absent_and_unusable_files_are_named(tmp_path, name, message):
    (tmp_path / "empty").write_bytes(b" \n")
    (tmp_path / "latin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises((FileNotFoundError, ValueError), match=message.format(tmp_path=tmp_path)):
        read_texts([name])


def test_windows_hold_every_token_once():
    windows = TextWindows([TEXT], TOKENIZER, window=7)
    samples = [windows[i] for i in range(len(windows))]
    expected = len(IDS) - (len(IDS) % 7 == 1)
    assert torch.cat([sample["input_ids"] for sample in samples]).tolist() == IDS[:expected]
    assert windows.lengths.tolist() == [len(sample["input_ids"]) for sample in samples]
    assert set(windows.lengths[:-1].tolist()) == {7}
    assert [sample["index"] for sample in samples] == list(range(len(windows)))
    assert {sample["prompt_length"] for sample in samples} == {1}
    assert samples[0]["input_ids"].dtype == torch.int64


def test_windows_do_not_go_across_texts_single_tokens_are_dropped_and_tokens_limited():
    windows = TextWindows([TEXT, TEXT], TOKENIZER, window=len(IDS) - 1)
    assert windows.lengths.tolist() == [len(IDS) - 1] * 2
    assert torch.equal(windows[0]["input_ids"], windows[1]["input_ids"])
    for limit, lengths in ((24, [10, 10, 4]), (21, [10, 10])):
        assert TextWindows([TEXT, TEXT], TOKENIZER, window=10, limit_tokens=limit).lengths.tolist() == lengths
    with pytest.raises(ValueError, match="fewer than 2"):
        TextWindows([""], TOKENIZER)


def test_each_window_starts_as_the_tokenizer_starts_a_text():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = END
    assert TextWindows([TEXT], tokenizer, window=8)[1]["input_ids"].tolist() == IDS[8:16]  # it does not
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.eos_token_id)]
    )
    windows = TextWindows([TEXT], tokenizer, window=8)
    assert windows[1]["input_ids"].tolist() == [tokenizer.bos_token_id, *IDS[7:14]]
