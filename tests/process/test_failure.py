"""What ran out, as real libraries say it when it really does; and how the dead are told apart."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from optikit.errors import (
    BY_CODE,
    DiskError,
    Exit,
    InputMissingError,
    OptikitError,
    OutOfMemoryError,
    StageFailedError,
)
from optikit.process import child, failure
from tests.process.children import small_disk

SAYS = """
import json, os, resource, sys, warnings
from pathlib import Path
from optikit.process import failure
warnings.simplefilter("ignore")
place = Path(sys.argv[1])
def safetensors_save():
    import torch
    from safetensors.torch import save_file
    save_file({"a": torch.zeros(500_000)}, place / "a.safetensors")
def torch_save():
    import torch
    torch.save({"a": torch.zeros(500_000)}, place / "a.pt")
def torch_save_as_before():
    import torch
    torch.save({"a": torch.zeros(500_000)}, place / "a.pt", _use_new_zipfile_serialization=False)
def numpy_save():
    import numpy as np
    np.save(place / "a.npy", np.zeros(500_000))
def numpy_savez():
    import numpy as np
    np.savez(place / "a.npz", a=np.zeros(500_000))
def sqlite():
    import sqlite3
    from contextlib import closing
    with closing(sqlite3.connect(place / "a.db")) as connection:
        connection.execute("create table t(x blob)")
        connection.execute("insert into t values (randomblob(4000000))")
        connection.commit()
def onnx_save():
    import numpy as np, onnx
    from onnx import helper, numpy_helper
    weights = numpy_helper.from_array(np.zeros(500_000, np.float32), "w")
    model = helper.make_model(helper.make_graph([], "g", [], [], [weights]))
    onnx.save_model(model, place / "m.onnx", save_as_external_data=True, location="m.data")
def onnx_ir_save():
    import numpy as np, onnx_ir as ir
    weights = ir.Value(name="w", const_value=ir.tensor(np.zeros(500_000, np.float32), name="w"))
    graph = ir.Graph([], [], nodes=[], initializers=[weights], opset_imports={"": 20})
    ir.save(ir.Model(graph, ir_version=10), place / "m.onnx", external_data="m.data")
def tokenizer_save():
    from tokenizers import Tokenizer, models
    Tokenizer(models.WordLevel({f"{i:064d}": i for i in range(60_000)}, unk_token="x")).save(str(place / "t.json"))
def gguf_save():
    import gguf, numpy as np
    writer = gguf.GGUFWriter(place / "g.gguf", "llama")
    writer.add_tensor("a", np.zeros(500_000, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
def text():
    (place / "a.json").write_text("x" * 4_000_000)
def text_wrapped():
    try:
        text()
    except OSError as error:
        raise RuntimeError("the shard can't be written") from error
def text_in_passing():
    try:
        text()
    except OSError:
        {}["shard"]
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
told = {}
for name in sys.argv[3:]:
    for path in place.iterdir():
        path.unlink()
    try:
        globals()[name]()
        told[name] = "no error"
    except BaseException as error:
        told[name] = failure.as_failure(error)["code"]
print(json.dumps(told))
"""
WRITERS = [
    "safetensors_save",
    "torch_save",
    "torch_save_as_before",
    "numpy_save",
    "numpy_savez",
    "sqlite",
    "onnx_save",
    "onnx_ir_save",
    "tokenizer_save",
    "gguf_save",
    "text",
    "text_wrapped",
    "text_in_passing",
]


def told(place: Path, how: str) -> dict[str, int]:
    command = [sys.executable, "-c", SAYS, str(place), how, *WRITERS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_full_disk_is_74_in_the_words_of_every_library(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        assert told(disk, "full") == dict.fromkeys(WRITERS, int(Exit.IO))


def test_so_is_a_limit_of_file_size(tmp_path: Path) -> None:
    (place := tmp_path / "place").mkdir()
    assert told(place, "limit") == dict.fromkeys(WRITERS, int(Exit.IO))


def test_so_is_a_full_device() -> None:
    with pytest.raises(OSError, match="No space") as caught, Path("/dev/full").open("w") as file:
        file.write("x")
    assert failure.as_failure(caught.value)["code"] == Exit.IO


ALLOCATES = """
import resource, sys
from optikit.process import failure
{imports}
have = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (have * {room} + 2**28,) * 2)
try:
    {allocate}
except BaseException as error:
    print(failure.as_failure(error)["code"], failure.cause(error))
"""


@pytest.mark.parametrize(
    ("imports", "allocate"),
    [
        ("", "bytearray(2**40)"),
        ("import numpy", "numpy.zeros(2**40)"),
        ("import torch", "torch.zeros(2**40)"),
        ("import mmap", "mmap.mmap(-1, 2**40)"),
        (
            "import threading",
            "[threading.Thread(target=threading.Event().wait, daemon=True).start() for _ in range(10000)]",
        ),
    ],
)
def test_memory_that_ran_out_is_137_in_the_words_of_every_library(imports: str, allocate: str) -> None:
    code = ALLOCATES.format(imports=imports, allocate=allocate, room=2) + "\nsys.stdout.flush()\nimport os\nos._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["137", "137"], done.stderr


def test_an_address_space_that_is_used_up_explains_any_error() -> None:
    code = (
        "import mmap, resource\nfrom optikit.process import failure\n"
        "have = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (have + 2**28, have + 2**28))\n"
        "print(failure.as_failure(ImportError('libx.so'))['code'])\n"
        "held = mmap.mmap(-1, 2**28 - 2**23)\n"
        "print(failure.as_failure(ImportError('libx.so'))['code'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["70", "137"], done.stderr


def raised(error: BaseException, cause: BaseException, *, how: str) -> BaseException:
    """Return an exception as Python leaves it that was raised from another, or while that was handled."""
    error.__context__ = cause
    error.__cause__ = cause if how == "from" else None
    error.__suppress_context__ = how != "in passing"
    return error


@pytest.mark.parametrize(
    ("error", "how", "code"),
    [
        (RuntimeError("shard"), "from", Exit.IO),
        (RuntimeError("shard"), "in passing", Exit.IO),
        (RuntimeError("shard"), "suppressed", Exit.STAGE_FAILED),
        (StageFailedError("no shard", fix="look"), "from", Exit.IO),
        (InputMissingError("no shard", fix="look"), "from", Exit.INPUT_MISSING),
        (ExceptionGroup("two", [ValueError(), OSError(errno.EDQUOT, "quota")]), "suppressed", Exit.IO),
        (OSError(errno.ENOENT, "shard"), "suppressed", Exit.STAGE_FAILED),
        (MemoryError(), "from", Exit.OUT_OF_MEMORY),
        (OutOfMemoryError("killed", fix="more"), "from", Exit.OUT_OF_MEMORY),
    ],
)
def test_what_stands_behind_an_error_counts_unless_it_has_a_better_name(error, how: str, code: Exit) -> None:
    response = failure.as_failure(raised(error, OSError(errno.ENOSPC, "full"), how=how))
    assert (response["ok"], response["code"]) == (False, code)
    with pytest.raises(BY_CODE[code]) as caught:
        failure.raise_failure(response, step="step", log=Path("log"))
    assert caught.value.message.startswith("step: ")
    assert caught.value.fix
    json.dumps(response)


def test_errors_that_are_each_other_s_cause_end() -> None:
    one, two = RuntimeError("one"), RuntimeError("two")
    one.__cause__, two.__cause__ = two, one
    assert failure.cause(one) is None
    assert failure.ran_out(one) is None


def test_in_this_process_too() -> None:
    error = failure.ran_out(raised(ValueError("x"), OSError(errno.ENOSPC, "full"), how="from"))
    assert isinstance(error, DiskError)
    assert error.fix


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", Exit.IO),
        ("error: Failed to write: Disk quota exceeded (os error 122)", Exit.IO),
        ("c++: fatal error: Killed signal terminated program cc1plus", None),
        ("terminate called after throwing an instance of 'std::bad_alloc'", Exit.OUT_OF_MEMORY),
        ("ValueError: 12 heads requested and 8 given", None),
        ("", None),
    ],
)
def test_what_programs_print(said: str, found: Exit | None) -> None:
    assert failure.cause_in(said) == found


class TestDeath:
    def of(self, tmp_path: Path, code: str) -> OptikitError:
        with child.started([sys.executable, "-c", code], log=tmp_path / "log") as it:
            it.watch("step", between=lambda: None)
            return it.death("step")

    @pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGTERM])
    def test_a_signal(self, tmp_path: Path, number: signal.Signals) -> None:
        error = self.of(tmp_path, f"import os; os.kill(os.getpid(), {int(number)})")
        assert type(error) is StageFailedError
        assert error.message.startswith(f"step: its process crashed with {number.name}; ")

    def test_a_kill_and_who_did_it(self, tmp_path: Path) -> None:
        error = self.of(tmp_path, "import os; os.kill(os.getpid(), 9)")
        assert type(error) is OutOfMemoryError
        assert "SIGKILL, most often for memory" in error.message
        log = tmp_path / "log"
        assert "by the kernel" in failure.death("step", -9, log, for_memory=True).message
        assert type(failure.death("step", 137, log)) is OutOfMemoryError

    def test_an_exit_code_and_the_fix(self, tmp_path: Path) -> None:
        error = self.of(tmp_path, "import sys; print('first'); sys.exit(3)")
        assert error.message == "step: its process ended with exit code 3; its log ends:\nfirst"
        assert error.fix == f"the whole log is {tmp_path / 'log'}"
        assert failure.death("step", 3, tmp_path / "log", fix="do that").fix == "do that"

    def test_no_room_for_an_answer(self, tmp_path: Path) -> None:
        assert type(self.of(tmp_path, "import sys; sys.exit(74)")) is DiskError

    def test_no_log_at_all(self, tmp_path: Path) -> None:
        assert "(empty)" in failure.death("step", 1, tmp_path / "none").message

    def test_a_page_that_found_no_room_on_disk(self, tmp_path: Path) -> None:
        maps = (
            "import mmap\nwith open({path!r}, 'wb+') as file:\n    file.truncate(4 << 20)\n"
            "    mapped = mmap.mmap(file.fileno(), 4 << 20)\n    mapped[:] = b'x' * (4 << 20)"
        )
        with small_disk(tmp_path / "disk") as disk:
            error = self.of(disk, maps.format(path=str(disk / "mapped")))
            assert type(error) is DiskError
            assert "SIGBUS" in error.message
        assert type(self.of(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGBUS)")) is StageFailedError

    def test_of_a_long_log_the_end_is_told_and_errors_before_it(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        log.write_text("noise\n" * 10**6 + "ValueError: the cause\n" + "noise\n" * 20 + "RuntimeError: see above\n")
        assert failure.tail(log) == "ValueError: the cause\n" + "noise\n" * 11 + "RuntimeError: see above"
        log.write_text("y" * 10**6)
        assert failure.tail(log) == "y" * 500
        log.write_bytes(b"\xff" * 10 + b"\n" + b"z\n" * 100)
        assert failure.tail(log) == "\n".join("z" * failure.TAIL_LINES)


def test_no_answer_is_a_timeout_with_the_end_of_the_log(tmp_path: Path) -> None:
    (log := tmp_path / "log").write_text("loading\n")
    error = failure.no_answer("it", 2.5, log, fix="wait")
    assert (error.code, error.message) == (Exit.TIMEOUT, "it: no answer in 2.5 s; its log ends:\nloading")


def test_errnos_are_words_here() -> None:
    for number in failure.DISK_ERRNOS:
        assert failure.cause_in(f"write failed: {os.strerror(number)}") == Exit.IO
