"""Modules and losses of other packages, unchanged: their weights and steps are those of loops written by hand."""

from importlib.util import find_spec

import pytest

from tests.examples import slow
from tests.foreign import basic, pictures, trainers
from tests.foreign.project import Project, measure

PROJECTS = [*basic.PROJECTS, *pictures.PROJECTS, *(trainers.PROJECTS if find_spec("trl") else [])]


#: Larger networks, whose losses other rows have as well.
LARGE = ("ResNet-18, cross_entropy", "LightningTransformer", "test_resnet, Mixup, BinaryCrossEntropy")


@pytest.mark.parametrize(
    "project",
    [slow(p) if p.name.startswith(LARGE) else p for p in PROJECTS if not p.refused],
    ids=lambda p: p.name,
)
def test_losses_and_first_gradient_are_those_written_by_hand(project: Project) -> None:
    losses, gradient = measure(project)
    assert losses < 1e-5
    assert gradient < 1e-5


@pytest.mark.parametrize("project", [p for p in PROJECTS if p.refused], ids=lambda p: p.name)
def test_what_has_no_loss_per_sample_is_refused(project: Project) -> None:
    with pytest.raises((ValueError, RuntimeError, TypeError), match=project.refused):
        measure(project)
