"""Short messages from the parser's long ones. `test_cli.py` has them from the real parser."""

import pytest

from flow_lightning.option_errors import explain

UNION = """Parser key "trainer.limit":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'float'>, dict[str, float], <class 'NoneType'>]
  Errors:
    - Expected a <class 'float'>
    - Expected a <class 'dict'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: abc"""
NESTED = """Does not validate against any of the Union subtypes
Errors:
  - No such
    data set.
  - Expected a <class 'NoneType'>"""


@pytest.mark.parametrize(
    ("message", "short"),
    [
        (UNION, "trainer.limit: 'abc' is no valid value. Expected float or dict[str, float] or null."),
        (NESTED, "No such data set."),
        ("Call to compute_fn of link 'f(a) --> b' with args (1) failed: too much", "too much"),
        ("something else", "something else"),
        (
            "Subcommand 'fit' does not accept option 'trainr.x'",
            "There is no option 'trainr.x'. Did you mean trainer.x? All options: flow-lightning fit --help-all.",
        ),
    ],
)
def test_a_message_is_shortened(message, short):
    assert explain(message, ["trainer.x"]) == short
