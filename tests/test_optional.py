import json

import pytest

from flow_lightning.optional import optional_import, package_folder


def test_an_installed_module_is_imported_and_a_package_found_without_that(tmp_path, monkeypatch):
    assert optional_import("json.decoder", "language", "tasks") is json.decoder
    (tmp_path / "breaks_on_import").mkdir()
    (tmp_path / "breaks_on_import" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_folder("breaks_on_import", "language", "tasks") == tmp_path / "breaks_on_import"


@pytest.mark.parametrize(
    ("find", "name"), [(optional_import, "absent_package.part"), (package_folder, "absent_package")]
)
def test_a_missing_package_says_what_to_install(find, name):
    message = r"'absent_package' is needed for tasks and .*pip install \"flow-lightning\[eval\]\""
    with pytest.raises(ImportError, match=message):
        find(name, "eval", "tasks")
