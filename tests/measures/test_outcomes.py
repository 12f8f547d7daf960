"""What a budget watches: which samples, how often they are read, and what a diverged model answers."""

import pytest
import torch
from torch.utils.data import DataLoader

from flow_lightning.measures import GeneralText, PretrainedImages
from flow_lightning.measures.outcomes import ImageOutcomes, StepOutcomes, TextOutcomes, halves, watched
from tests.images import tiny_module
from tests.language import language_module
from tests.unchanged import Classifier


class Counting(list):
    """A data set that counts how often it is read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("most", [2, 5, 99])
def test_halves_have_no_group_in_common_and_are_the_same_in_every_run(most):
    groups = [number // 3 for number in range(30)]
    one, other = halves(groups, most)
    assert len(one) == len(other) == min(most, 15)
    assert not {groups[i] for i in one} & {groups[i] for i in other}
    assert (one, other) == halves(groups, most) and one == sorted(one) and one != list(range(len(one)))


@pytest.mark.parametrize(("workers", "memory", "reads"), [(0, 2**30, 6), (1, 2**30, 0), (0, 200, 2 + 3 * 4)])
def test_a_sample_is_read_once_while_there_is_memory(monkeypatch, workers, memory, reads):
    """Workers read it each time, in processes of their own."""
    monkeypatch.setattr("flow_lightning.scoring.samples._MEMORY", memory)
    dataset, outcomes = Counting([(torch.ones(16), 1)] * 6), StepOutcomes()
    outcomes.take(DataLoader(dataset, batch_size=4, num_workers=workers))
    for _ in range(3):
        assert [len(x) for x, _ in outcomes.loader] == [4, 2]
    assert dataset.reads == reads


def test_a_diverged_model_agrees_with_nothing_and_has_nothing_right():
    module = tiny_module()
    torch.nn.init.constant_(module.head.weight, torch.nan)
    batch = {"image": torch.zeros(2, 3, 32, 32), "target": torch.tensor([0, 1])}
    assert ImageOutcomes("agreement", None).of_batch(module, batch)[0].tolist() == [-1, -1]
    assert ImageOutcomes("accuracy", None).of_batch(module, batch)[0].tolist() == [0, 0]


def test_what_is_watched_follows_from_what_is_kept_and_the_module():
    assert isinstance(watched("agreement", None, Classifier()), StepOutcomes)
    assert isinstance(watched("agreement", None, tiny_module()), ImageOutcomes)
    assert watched("accuracy", "folder", tiny_module()).source.images == "folder"
    images, text = PretrainedImages("folder"), GeneralText(["a.txt"])
    assert watched("agreement", images, tiny_module()).source is images
    assert watched("perplexity", text, tiny_module()).source is text
    assert watched("perplexity", "a.txt", tiny_module()).source.texts == ["a.txt"]
    assert isinstance(watched("perplexity", ["a.txt", "b.txt"], tiny_module()), TextOutcomes)
    tokens = watched("agreement", "a.txt", language_module())
    assert isinstance(tokens, TextOutcomes) and tokens.source.texts == ["a.txt"]
    with pytest.raises(TypeError, match="For CausalLanguageModule and of='agreement', give text files"):
        watched("agreement", None, language_module())
    with pytest.raises(TypeError, match="of='accuracy', give a folder of images or a PretrainedImages"):
        watched("accuracy", text, tiny_module())
