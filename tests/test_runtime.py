"""Threads, ISA levels and fork: each case that could hang or crash runs in a process of its own.

Timeouts are guards against hanging, a hundred times what a case takes; none is a measurement.
"""

import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from pyengine import _C
from pyengine.errors import ArgumentError

HANG_SECONDS = 60

# 64 rows of 4096 make 13 tasks, so that every thread has work.
PRELUDE = """
import os, sys, threading
import numpy as np
from pyengine import _C

X = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32)
WEIGHT = np.ones(4096, np.float32)

def work():
    y = np.empty_like(X)
    _C.rms_norm_fwd_cpu(X, None, WEIGHT, None, y, None, 1e-6, 0.0)
    return y

def in_child(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid

def wait(*pids):
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0, "the child failed"

def check():
    assert np.array_equal(work(), RIGHT), "other bits"

_C.set_num_threads(1)
RIGHT = work()
_C.set_num_threads(4)
"""


def run(source, *, prelude="import os\nfrom pyengine import _C\n", folder=None, **environment):
    """Output of a child that runs `source`; fails the test where the child does."""
    code = prelude + textwrap.dedent(source)
    arguments = [sys.executable, "-c", code]
    if folder is not None:  # multiprocessing imports the main module again
        (folder / "main.py").write_text(code)
        arguments = [sys.executable, str(folder / "main.py")]
    child = subprocess.Popen(
        arguments,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = child.communicate(timeout=HANG_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # it and its own children, which may be what hangs
        child.communicate()
        pytest.fail(f"no end after {HANG_SECONDS} s")
    assert child.returncode == 0, stderr
    return stdout.strip()


# --- size of the pool -------------------------------------------------------------------------------------------------


@pytest.fixture
def num_threads():
    before = _C.num_threads()
    yield
    _C.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 7, 256])
def test_sizes_in_bounds(num_threads, count):
    _C.set_num_threads(count)
    assert _C.num_threads() == count


@pytest.mark.parametrize("count", [0, -1, 257, -(2**31), 2**31 - 1])
def test_sizes_out_of_bounds(num_threads, count):
    before = _C.num_threads()
    with pytest.raises(ArgumentError, match=f"^num_threads: expected 1 to 256, got {count}$"):
        _C.set_num_threads(count)
    assert _C.num_threads() == before


@pytest.mark.parametrize("count", [2**31, 2**64, 1.5, "2", None])
def test_sizes_that_are_no_int(num_threads, count):
    with pytest.raises(TypeError):
        _C.set_num_threads(count)


def test_environment_sets_the_size():
    for count in ("1", "3", "256"):
        assert run("print(_C.num_threads())", PYENGINE_NUM_THREADS=count) == count
    assert run("_C.set_num_threads(2); print(_C.num_threads())", PYENGINE_NUM_THREADS="5") == "2"
    default = run("print(_C.available_cpus())")
    assert run("print(_C.num_threads())", PYENGINE_NUM_THREADS="") == default


@pytest.mark.parametrize("text", ["0", "-1", "257", "two", "1.5", "4x", "4 ", "9" * 30, "0x2"])
def test_environment_with_a_bad_size(text):
    message = run(
        """
        from pyengine.errors import ArgumentError
        for call in (_C.num_threads, _C.num_threads, _C.build_info):
            try:
                call()
            except ArgumentError as error:
                print(error)
        _C.set_num_threads(2)  # the way out
        assert _C.num_threads() == 2
        """,
        PYENGINE_NUM_THREADS=text,
    )
    line = f"PYENGINE_NUM_THREADS: expected a whole number from 1 to 256, got '{text}'"
    assert message.splitlines() == [line] * 3


@pytest.mark.parametrize(
    ("cpu_max", "cpus"),
    [
        ("50000 100000", 1),
        ("100000 100000", 1),
        ("150000 100000", 2),
        ("max 100000", math.inf),
        ("100000000 100000", math.inf),
        ("", math.inf),
        ("nonsense", math.inf),
        ("0 100000", math.inf),
        ("-1 100000", math.inf),
        ("100000 0", math.inf),
        ("nan nan", math.inf),
        ("1e300 1e-300", math.inf),
    ],
)
def test_quota_of_the_cgroup(tmp_path, cpu_max, cpus):
    (tmp_path / "cpu.max").write_text(cpu_max + "\n")
    allowed = min(len(os.sched_getaffinity(0)), 256)
    assert _C.available_cpus(str(tmp_path)) == min(cpus, allowed)


def test_without_a_cgroup(tmp_path):
    assert _C.available_cpus(str(tmp_path / "absent")) == min(len(os.sched_getaffinity(0)), 256)
    (tmp_path / "cpu.max").mkdir()
    assert _C.available_cpus(str(tmp_path)) == min(len(os.sched_getaffinity(0)), 256)


def test_affinity_of_one_cpu():
    output = run(
        """
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(_C.available_cpus(), _C.num_threads())
        """,
        PYENGINE_NUM_THREADS="",
    )
    assert output == "1 1"


def test_pools_of_many_sizes_give_the_same_bits():
    run(
        """
        before = len(os.listdir("/proc/self/task"))
        for i in range(200):
            _C.set_num_threads(1 + i * 7 % 11)
            check()
        assert len(os.listdir("/proc/self/task")) <= before + 10, "threads of old pools are left"
        """,
        prelude=PRELUDE,
    )


def test_threads_take_turns():
    run(
        """
        failures = []
        def loop(seed):
            for i in range(50):
                _C.set_num_threads(1 + (i + seed) % 4)
                if not np.array_equal(work(), RIGHT):
                    failures.append(i)
        threads = [threading.Thread(target=loop, args=(seed,)) for seed in range(6)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not failures
        """,
        prelude=PRELUDE,
    )


def test_an_op_that_throws_leaves_the_pool_whole():
    run(
        """
        from pyengine.errors import ArgumentError
        x = np.ones((40, 8), np.float32)
        w = np.ones((600, 8), np.float32)
        nll, lse = np.empty(40, np.float32), np.empty(40, np.float32)
        targets = np.zeros(40, np.int64)
        targets[39] = 600
        for _ in range(100):
            try:
                _C.linear_cross_entropy_fwd_cpu(x, w, targets, nll, lse, -100)
                raise SystemExit("a bad target passed")
            except ArgumentError as error:
                assert "600" in str(error), error
            check()
        """,
        prelude=PRELUDE,
    )


DAEMON = "threading.Thread(target=lambda: [work() for _ in range(500)], daemon=True).start()"


@pytest.mark.parametrize("ending", ["pass", "sys.exit(0)", DAEMON], ids=["end", "exit", "daemon"])
def test_the_process_ends_while_the_pool_lives(ending):
    run("check()\n" + ending, prelude=PRELUDE)


# --- ISA levels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", _C.available_isas())
def test_environment_lowers_the_level(level):
    source = """
    assert _C.build_info()["isa"] == _C.active_isa()
    for name in _C.available_isas():
        _C.set_active_isa(name)
        np.testing.assert_allclose(work(), RIGHT, rtol=1e-5)
    """
    assert run("print(_C.active_isa())", PYENGINE_ISA=level) == level
    run(source, prelude=PRELUDE, PYENGINE_ISA=level)


def test_the_default_is_the_best_level():
    assert run("print(_C.active_isa())", PYENGINE_ISA="") == _C.available_isas()[-1]


@pytest.mark.parametrize("level", ["avx", "AVX2", "avx2 ", "fast", "neon"])
def test_environment_with_an_unknown_level(level):
    check_refused_level(level)


def test_environment_does_not_raise_the_level():
    known = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"]
    lacking = [level for level in known if level not in _C.available_isas()]
    if not lacking:
        pytest.skip("this machine has every level")
    assert _C.available_isas() == known[: -len(lacking)]
    assert _C.build_info()["isa_limit_reason"].startswith(lacking[0] + ": ")
    for level in lacking:
        check_refused_level(level)


def check_refused_level(level):
    message = run(
        """
        from pyengine.errors import ArgumentError
        for call in (_C.active_isa, _C.build_info, lambda: _C.set_active_isa("scalar")):
            try:
                call()
                raise SystemExit("passed")
            except ArgumentError as error:
                print(error)
        """,
        PYENGINE_ISA=level,
    )
    levels = ", ".join(_C.available_isas())
    line = f"PYENGINE_ISA: expected one of the levels of this machine ({levels}), got '{level}'"
    assert message.splitlines() == [line] * 3


def test_set_active_isa_returns_the_previous_level():
    before = _C.active_isa()
    assert _C.set_active_isa("scalar") == before
    with pytest.raises(
        ArgumentError, match=r"^isa: expected one of the levels of this machine \(scalar.*\), got 'sse'"
    ):
        _C.set_active_isa("sse")
    assert _C.active_isa() == "scalar"
    assert _C.set_active_isa(before) == "scalar"


def test_build_info_has_the_facts():
    info = _C.build_info()
    isa_facts = {"isa", "available_isas", "isa_limit_reason", "isa_emulation"}
    assert {"version", "compiler", "cpu", "num_threads"} | isa_facts == set(info)
    assert info["isa"] in info["available_isas"]
    assert info["available_isas"][0] == "scalar"
    assert info["isa_emulation"] == "", "a build for tests, see PYENGINE_EMULATE_AMX; not one to measure or to ship"


# --- fork -------------------------------------------------------------------------------------------------------------

FORKS = {
    "after_use": """
        check()
        wait(in_child(check))
        check()
    """,
    "before_use": """
        wait(in_child(check))
        check()
    """,
    "both_at_once": """
        check()
        def many():
            for _ in range(20):
                check()
        child = in_child(many)
        many()
        wait(child)
    """,
    "several_children": """
        check()
        wait(*[in_child(check) for _ in range(8)])
        check()
    """,
    "child_forks_again": """
        check()
        def child():
            check()
            wait(in_child(check), in_child(check))
            check()
        wait(in_child(child))
    """,
    "child_resizes_the_pool": """
        check()
        def child():
            for count in (1, 2, 3, 4, 8):
                _C.set_num_threads(count)
                check()
        wait(in_child(child))
        assert _C.num_threads() == 4
        check()
    """,
    "after_the_pool_was_resized": """
        for count in (2, 5, 3):
            _C.set_num_threads(count)
            check()
        wait(in_child(check))
    """,
    "in_a_thread": """
        check()
        failures = []
        def fork():
            try:
                wait(in_child(check))
            except AssertionError as error:
                failures.append(error)
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
        assert not failures
        check()
    """,
    "while_another_thread_is_in_an_op": """
        stop = threading.Event()
        def busy():
            while not stop.is_set():
                work()
        threads = [threading.Thread(target=busy) for _ in range(2)]
        [thread.start() for thread in threads]
        for _ in range(20):
            wait(in_child(check))
        stop.set()
        [thread.join() for thread in threads]
        check()
    """,
    "while_another_thread_resizes_the_pool": """
        stop = threading.Event()
        def busy():
            count = 0
            while not stop.is_set():
                count += 1
                _C.set_num_threads(2 + count % 3)
                work()
        thread = threading.Thread(target=busy)
        thread.start()
        for _ in range(20):
            wait(in_child(check))
        stop.set()
        thread.join()
        check()
    """,
    "while_another_thread_makes_the_first_pool": """
        ready = threading.Event()
        def first():
            ready.set()
            work()
        thread = threading.Thread(target=first)
        thread.start()
        ready.wait()
        for _ in range(6):
            wait(in_child(check))
        thread.join()
    """,
    "child_ends_by_exit": """
        check()
        child = os.fork()
        if child == 0:
            check()
            sys.exit(0)
        wait(child)
    """,
}


@pytest.mark.parametrize("pattern", FORKS)
def test_fork(pattern):
    run(FORKS[pattern], prelude=PRELUDE)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(tmp_path, method):
    run(
        f"""
        def task(seed):
            check()
            return float(work().sum())

        if __name__ == "__main__":
            import multiprocessing
            check()
            with multiprocessing.get_context("{method}").Pool(2) as pool:
                assert pool.map(task, range(6)) == [float(RIGHT.sum())] * 6
            process = multiprocessing.get_context("{method}").Process(target=check)
            process.start()
            process.join()
            assert process.exitcode == 0
            check()
        """,
        prelude=PRELUDE,
        folder=tmp_path,
    )


def test_the_module_may_be_imported_by_the_child_alone():
    run(
        """
        pid = os.fork()
        if pid == 0:
            try:
                import numpy as np
                from pyengine import _C
                x, weight = np.ones((64, 4096), np.float32), np.ones(4096, np.float32)
                y = np.empty_like(x)
                _C.set_num_threads(3)
                _C.rms_norm_fwd_cpu(x, None, weight, None, y, None, 0.0, 0.0)
                os._exit(int(not (y == 1).all()))
            except BaseException:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        """,
        prelude="import os\n",
    )


def test_bits_do_not_depend_on_threads(num_threads):
    x = np.random.default_rng(0).standard_normal((301, 517)).astype(np.float32)
    weight, results = np.ones(517, np.float32), []
    for count in (1, 2, 3, 4, 8):
        _C.set_num_threads(count)
        y = np.empty_like(x)
        _C.rms_norm_fwd_cpu(x, None, weight, None, y, None, 1e-6, 0.0)
        results.append(y.tobytes())
    assert len(set(results)) == 1
