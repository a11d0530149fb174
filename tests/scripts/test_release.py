"""What is published: its version, tag and changelog agree, and nothing is missing or too much in its files."""

from __future__ import annotations

import datetime
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from helpers import ROOT
from runtime import __version__
from scripts import release

CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- New.\n\n## [0.1.0] - 2026-01-02\n\n- Old.\n"
DAY = datetime.date(2026, 3, 4)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with all that has to do with the version."""
    (tmp_path / "runtime").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.1.0"\n[tool.x]\npython_version = "3.11"\n')
    (tmp_path / "runtime" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    return tmp_path


def test_the_version_of_this_checkout_is_that_of_the_package() -> None:
    assert release.version_of(ROOT) == __version__
    assert release.section((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), "Unreleased").startswith("### ")


@pytest.mark.parametrize("version", ["0.2.0", "1.0.0rc1"])
def test_prepare_gives_the_version_what_was_unreleased(checkout: Path, version: str) -> None:
    release.prepare(checkout, version, DAY)
    assert release.version_of(checkout) == version
    assert 'python_version = "3.11"' in (checkout / "pyproject.toml").read_text()
    changelog = (checkout / "CHANGELOG.md").read_text()
    assert f"## [Unreleased]\n\n## [{version}] - 2026-03-04\n\n### Added\n\n- New.\n" in changelog
    found = [release.section(changelog, name) for name in ("Unreleased", version, "0.1.0", "0x1.0")]
    assert found == ["", "### Added\n\n- New.", "- Old.", ""]
    release.check_tag(version, ["nightly", f"v{version}"], "", changelog)


@pytest.mark.parametrize(
    ("version", "replaced", "by", "words"),
    [
        ("0.2", "", "", "write 0.2.0"),
        ("v0.2.0", "", "", "write 0.2.0"),
        ("0.1.0", "", "", "choose another version"),
        ("0.2.0", "## [Unreleased]\n", "", "expected one line"),
        ("0.2.0", "### Added\n\n- New.\n", "", "nothing to release"),
    ],
)
def test_prepare_refuses_and_writes_nothing(version: str, replaced: str, by: str, words: str, checkout: Path) -> None:
    (checkout / "CHANGELOG.md").write_text(CHANGELOG.replace(replaced, by))
    before = {path: path.read_text() for path in checkout.rglob("*.*")}
    with pytest.raises(release.ReleaseError, match=words.replace("[", r"\[")):
        release.prepare(checkout, version, DAY)
    assert {path: path.read_text() for path in checkout.rglob("*.*")} == before


def test_places_of_the_version_that_disagree(checkout: Path) -> None:
    (checkout / "runtime" / "__init__.py").write_text('__version__ = "0.1.1"\n')
    with pytest.raises(release.ReleaseError, match=r"pyproject.toml: 0.1.0, runtime/__init__.py: 0.1.1"):
        release.version_of(checkout)


@pytest.mark.parametrize(
    ("version", "tags", "changes", "words"),
    [
        ("0.1.0", ["v0.1.0"], " M README.md\n", "no commit has.*README.md"),
        ("0.1.0", [], "", "it has no tag; run `git tag v0.1.0`"),
        ("0.1.0", ["v0.1.1", "0.1.0"], "", "its tags are 0.1.0, v0.1.1"),
        ("0.2.0", ["v0.2.0"], "", "has no section `## .0.2.0. - DATE`"),
        ("Unreleased", ["vUnreleased"], "", "has no section"),
    ],
)
def test_a_commit_that_is_no_release(version: str, tags: list[str], changes: str, words: str) -> None:
    with pytest.raises(release.ReleaseError, match=f"(?s){words}"):
        release.check_tag(version, tags, changes, CHANGELOG)


TRACKED = {"runtime/errors.py", "configs/choice.toml", "native/c.cpp", "tests/conftest.py", "README.md"}


def wheel(folder: Path, names: set[str]) -> Path:
    path = folder / "x-1-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names | {"x-1.dist-info/METADATA", "runtime/"}:
            archive.writestr(name, "text")
    return path


def sdist(folder: Path, names: set[str]) -> Path:
    path = folder / "x-1.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names | {"x.egg-info/PKG-INFO"}:
            archive.addfile(tarfile.TarInfo(f"x-1/{name}"), io.BytesIO())
    return path


def test_files_of_a_wheel(tmp_path: Path) -> None:
    whole = {"runtime/errors.py", "configs/choice.toml", release.LIBRARY}
    assert release.problem_of_wheel(wheel(tmp_path, whole), TRACKED) == ""
    assert f"lacks ['{release.LIBRARY}'], and" in release.problem_of_wheel(
        wheel(tmp_path, whole - {release.LIBRARY}), TRACKED
    )
    problem = release.problem_of_wheel(
        wheel(tmp_path, {*whole, "tests/conftest.py"} - {"configs/choice.toml"}), TRACKED
    )
    assert "lacks ['configs/choice.toml'], and has besides ['tests/conftest.py']: see packages in setup.py" in problem


def test_files_of_a_source_distribution(tmp_path: Path) -> None:
    whole = release.SDIST_FILES | {"runtime/errors.py", "configs/choice.toml", "native/c.cpp"}
    assert release.problem_of_sdist(sdist(tmp_path, whole), TRACKED) == ""
    assert "lacks ['native/c.cpp'], and has besides nothing" in release.problem_of_sdist(
        sdist(tmp_path, whole - {"native/c.cpp"}), TRACKED
    )


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wheel(tmp_path, {release.LIBRARY})
    monkeypatch.setitem(release.MAX_BYTES, ".whl", path.stat().st_size)
    assert release.too_large(path) == ""
    monkeypatch.setitem(release.MAX_BYTES, ".whl", path.stat().st_size - 1)
    assert "leave out what users do not need" in release.too_large(path)


def test_an_answer_that_is_wrong_or_asks_for_more_than_the_wheel_is_no_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release.venv, "create", lambda *_, **__: None)
    for printed, words in (
        ("True True 0.1.0", ""),
        ("True False 0.1.0", "False"),
        ("True 0.0.9", "version 0.0.9"),
        ("0.1.0", "\\[\\]"),
    ):
        monkeypatch.setattr(release, "run", lambda *_, printed=printed, **__: printed)
        if words:
            with pytest.raises(release.ReleaseError, match=words):
                release.answer_without_pytorch(Path("x.whl"), "0.1.0", tmp_path)
        else:
            release.answer_without_pytorch(Path("x.whl"), "0.1.0", tmp_path)


@pytest.mark.parametrize("name", ["torch", "socket"])
def test_what_asks_in_the_empty_environment_refuses(name: str) -> None:
    """PyTorch is here, so that the first check ends it; without that check, what connects ends it."""
    before, after = release.ASK.format(absent=release.ABSENT if name == "torch" else ()).split(
        "import importlib.resources"
    )
    assert "Qwen3VLModel" in after
    connect = 'import socket\nsocket.create_connection(("localhost", 1))\n'
    words = "found where the extra cpu alone was installed: .*torch" if name == "torch" else "asks for the network"
    with pytest.raises(release.ReleaseError, match=words):
        release.run(release.sys.executable, "-c", before + connect)
