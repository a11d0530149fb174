"""The output folder: written beside its place, and exchanged with what is there when it is complete.

Everything is on the disk before the exchange (`fsync`), and the exchange is one step (`renameat2`), so that whenever
the process or the machine dies the output is the older engine or the new one, whole. Two exceptions:

- A file system without that step (NFS, most of FUSE) gets two renames. A process that dies between them leaves no
  output; the next run puts the older engine back.
- A place that cannot be renamed is filled where it is: a mount point (`docker -v`), the working directory, a folder of
  an image's lower layer, a folder whose parent is not writable. The older manifest goes first and the new one comes
  last, so a process that dies in these milliseconds leaves a folder that nothing opens.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from engines.bundle import BUNDLE_MANIFEST_NAME, DECODER, PREFILL, VISION
from engines.disk import check_disk_space, check_file_size, disk_error, full_disk_error, sync_files, sync_folder
from engines.exchange import exchange
from engines.work_folder import OLD, is_work_folder, work_folder
from runtime.decode_plan import PLAN_NAME
from runtime.errors import UsageError
from runtime.manifest import LOWERED_NAME, MANIFEST_NAME

# Graphs, tokenizer and manifest; the largest seen is a tokenizer of 11 MB.
_SMALL_FILES_BYTES = 64 << 20
_MANIFESTS = (MANIFEST_NAME, LOWERED_NAME, BUNDLE_MANIFEST_NAME)
_GRAPHS = frozenset({f"{VISION}.onnx", f"{DECODER}.onnx"})
_OWN_NAMES = (
    _GRAPHS
    | {f"{PREFILL}.onnx", *(f"{graph}.onnx.data" for graph in (VISION, DECODER, PREFILL)), "cache_scales.npy"}
    | {f"{VISION}.plan", f"{DECODER}.plan", PLAN_NAME}
    | {*_MANIFESTS}
    | {"config.json", "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json"}
    | {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
)
# Machine code of a decode plan, one file for each kind of GPU.
_CODE_NAME = re.compile(r"decode_plan_sm[0-9]{2,3}\.bin")
_IN_USE = frozenset({errno.ENOTEMPTY, errno.EEXIST})
# A mount point; a folder of a lower layer of overlayfs; a folder in a sticky one, or itself not writable.
_FIXED = frozenset({errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES})


def check_output(output: Path, weight_bytes: int = 0) -> None:
    """Raise, before any work, if `output` is not a place for an engine; what earlier runs left beside it is removed.

    A folder is made there and removed again: permissions, read-only file systems and used-up quotas show by that.

    Args:
        output: The engine folder.
        weight_bytes: Estimate of what the weights will take, in at most three files.

    Raises:
        UsageError: It is a file, a broken link, a folder of something else, or cannot be written.
        CapacityError: The disk has too little room, or files of that size are not allowed.
    """
    with _work_folder(output, weight_bytes, weight_bytes // 3):
        pass


@contextlib.contextmanager
def output_folder(output: Path, weight_bytes: int, largest_file_bytes: int = 0) -> Iterator[Path]:
    """Give an empty folder that takes the place of `output` when the block ends without an error.

    Args:
        output: The engine folder. A link is followed.
        weight_bytes: What will be written, without the small files.
        largest_file_bytes: Size of the largest file.

    Raises:
        UsageError: `output` is not a place for an engine.
        CapacityError: The disk has too little room for `weight_bytes`, or becomes full.
    """
    with _work_folder(output, weight_bytes, largest_file_bytes) as (place, folder, held):
        fresh = folder / "new"
        try:
            fresh.mkdir()
            yield fresh
        except OSError as error:
            full = full_disk_error(error, place)
            if full is None and not str(error.filename).startswith(str(folder)):
                raise  # from what is read
            raise full or disk_error(error, place) from error
        try:
            sync_files(fresh)
            with held:
                _put(fresh, place)
        except OSError as error:
            raise disk_error(error, place) from error


@contextlib.contextmanager
def _work_folder(
    output: Path, weight_bytes: int, largest_file_bytes: int
) -> Iterator[tuple[Path, Path, contextlib.AbstractContextManager[None]]]:
    """Check the place; give its real path, a folder on its disk, and what holds signals back."""
    try:
        if os.path.islink(output) and not os.path.exists(output):
            raise UsageError(f"{output}: a broken link", remedy="remove it, or choose another --output")
        place = Path(os.path.realpath(output))
        _check_is_ours(place)
        is_inside = os.path.isdir(place) and not _can_be_renamed(place)
    except (OSError, ValueError) as error:
        raise disk_error(error, output) from error
    parent, name = (place, "") if is_inside else (place.parent, place.name)
    with work_folder(parent, name) as (folder, interrupts):
        check_disk_space(folder, weight_bytes + _SMALL_FILES_BYTES, output)
        check_file_size(place, largest_file_bytes)
        yield place, folder, interrupts.held()


def _check_is_ours(place: Path) -> None:
    while True:
        try:
            before = os.lstat(place)
            if _is_ours(place):
                return
            if os.path.samestat(before, os.lstat(place)):
                break
            # Another run put its output there between the two looks.
        except (FileNotFoundError, NotADirectoryError):  # of the latter, the folder above tells when it is made
            return
    raise UsageError(
        f"{place}: exists and is neither an engine nor empty, so it is not overwritten",
        remedy="choose another --output, or remove it yourself",
    )


def _is_ours(folder: Path) -> bool:
    """Whether everything in the folder is ours to delete: empty, or graphs or a manifest of ours and no other name.

    The small files alone are those of any Hugging Face folder. `lost+found` is of the file system.
    """
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    found = {name for name in names if not is_work_folder(name) and name != "lost+found"}
    has_mark = bool(found & {*_MANIFESTS}) or found >= _GRAPHS
    return not found or (has_mark and all(map(_is_own_name, found)) and not any(names[name] for name in found))


def _is_own_name(name: str) -> bool:
    return name in _OWN_NAMES or _CODE_NAME.fullmatch(name) is not None


def _can_be_renamed(place: Path) -> bool:
    """Whether a folder can be exchanged with one beside it, as far as that shows without trying."""
    is_working = os.path.exists(os.curdir) and os.path.samefile(place, os.curdir)
    return not (is_working or _is_mount_point(place)) and os.access(place.parent, os.W_OK)


def _is_mount_point(place: Path) -> bool:
    """Like `os.path.ismount`, which misses a folder that is mounted from the same disk."""
    if os.path.ismount(place):
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    # Field 5 (proc_pid_mountinfo(5)), in which a space is written as \040.
    points = (line.split(b" ")[4].decode("unicode_escape").encode("latin-1") for line in mounts)
    return os.fsencode(place) in points


def _put(fresh: Path, place: Path) -> None:
    """Let `place` be the fresh folder; what was there before is left beside `fresh`.

    Raises:
        UsageError: Meanwhile `place` became something that is not ours.
        OSError: It cannot be moved there.
    """
    is_put = False
    while not is_put:
        is_put = _try_put(fresh, place)
    sync_folder(place.parent)


def _try_put(fresh: Path, place: Path) -> bool:
    """Put it there; False if another run put its output there, or took the older one away, between two steps."""
    try:
        if not os.path.lexists(place):
            os.rename(fresh, place)
        elif fresh.parent.parent == place or _is_mount_point(place):
            _fill(fresh, place)
        else:
            _replace(fresh, place)
    except OSError as error:
        if error.errno in _IN_USE or (error.errno == errno.ENOENT and fresh.exists() and place.parent.exists()):
            return False
        if error.errno not in _FIXED or not place.is_dir():
            raise
        _fill(fresh, place)
    return True


def _replace(fresh: Path, place: Path) -> None:
    if exchange(fresh, place):
        if not _is_ours(fresh):
            exchange(fresh, place)
            _check_is_ours(place)
        return
    _check_is_ours(place)
    old = fresh.parent / f"{OLD}{len(list(fresh.parent.glob(f'{OLD}*'))):03}"  # a free name
    os.rename(place, old)
    try:
        os.rename(fresh, place)
    except BaseException:
        if not os.path.lexists(place):
            os.rename(old, place)
        raise


def _fill(fresh: Path, place: Path) -> None:
    """Move the files one by one into `place`, and remove all others of ours from it."""
    with _locked(place):
        _check_is_ours(place)
        names = sorted(os.listdir(fresh), key=lambda name: (name in _MANIFESTS, name))
        for name in _MANIFESTS:
            (place / name).unlink(missing_ok=True)
        sync_folder(place)
        for name in sorted(filter(_is_own_name, {*os.listdir(place)} - {*names})):
            (place / name).unlink(missing_ok=True)
        for name in names:
            if name in _MANIFESTS:
                sync_folder(place)
            os.rename(fresh / name, place / name)
        sync_folder(place)
        fresh.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time fill a folder; where folders have no locks (NFS), nothing is waited for."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
