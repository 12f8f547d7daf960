import json

import pytest

from flow_lightning.optional import optional_import, package_folder


def test_an_installed_module_is_imported():
    assert optional_import("json.decoder", "language") is json.decoder


@pytest.mark.parametrize("find", [optional_import, package_folder])
def test_a_missing_package_says_what_to_install(find):
    message = r"'absent_package' is needed for tasks and .*pip install \"flow-lightning\[eval\]\""
    with pytest.raises(ImportError, match=message):
        find("absent_package" if find is package_folder else "absent_package.part", "eval", "tasks")


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "breaks_on_import").mkdir()
    (tmp_path / "breaks_on_import" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_folder("breaks_on_import", "language") == tmp_path / "breaks_on_import"
