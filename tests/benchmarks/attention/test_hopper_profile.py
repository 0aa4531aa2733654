"""`benchmarks.attention.profile` with a program in place of Nsight Compute."""

import json

import pytest

from benchmarks.attention import profile as hopper_profile

OWN = 'echo "$*" >> {log}; echo "$JAX_COMPILATION_CACHE_DIR" >> {log}; exit {status}'
NCU = """
while [ $# -gt 0 ]; do
    case "$1" in --log-file) report=$2 ;; esac
    shift
done
cat {page} > "$report"
"""


def page(**values):
    """ncu's page of one launch: names, units and values, after what it prints."""
    default = dict.fromkeys((name for name, _ in hopper_profile.METRICS.values()), "1")
    table = {"ID": "0", "Kernel Name": "a_kernel"} | default | values
    rows = (table, ["n"] * len(table), table.values())
    lines = [",".join(f'"{cell}"' for cell in row) for row in rows]
    return "\n".join(["==PROF== Connected", *lines])


def test_metrics():
    found = hopper_profile.metrics(
        page(
            **{
                "gpu__time_duration.sum": "258,048,704",
                "lts__t_sector_hit_rate.pct": "80.4712",
            }
        )
    )
    assert found["kernel"] == "a_kernel"
    assert found["duration_ms"] == 258.0
    assert found["l2_hit_pct"] == 80.47
    assert found.keys() == {"kernel", *hopper_profile.METRICS}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("==PROF== Connected", "no launch was profiled"),
        ("\n".join(page().splitlines()[:3]), "no launch was profiled"),
        (page().replace("lts__t", "other"), "ncu says nothing of"),
        (page(**{"lts__t_sector_hit_rate.pct": "no data"}), "could not convert"),
    ],
    ids=["no-table", "no-launch", "no-metric", "no-number"],
)
def test_metrics_that_are_missing(text, cause):
    with pytest.raises(ValueError, match=cause):
        hopper_profile.metrics(text)


@pytest.fixture
def programs(tmp_path, stand_ins):
    """Makes programs in place of ncu and of Python without it; returns their log."""

    def make(text, status=0):
        log = tmp_path / "log"
        (tmp_path / "page").write_text(text)
        stand_ins(
            {
                "ncu": NCU.format(page=tmp_path / "page"),
                "python": OWN.format(log=log, status=status),
            }
        )
        return log

    return make


def test_profiles(programs, tmp_path, capsys):
    """Each case is compiled without the profiler first, into a cache."""
    log = programs(page())
    output = tmp_path / "x.json"
    hopper_profile.main(["--densities", "1", "0.5", "--output", str(output)])
    capsys.readouterr()
    results = json.loads(output.read_text())["results"]
    cases = [(r["contender"], r["density"]) for r in results]
    assert cases == [("ours", 1.0), ("ours", 0.5), ("cudnn", 1.0)]
    assert {r["kernel"] for r in results} == {"a_kernel"}
    calls, caches = (log.read_text().splitlines()[i::2] for i in (0, 1))
    assert [line.split("--call ")[1] for line in calls] == [
        "ours --shape hunyuan --densities 1.0",
        "ours --shape hunyuan --densities 0.5",
        "cudnn --shape hunyuan --densities 1.0",
    ]
    assert all(caches)


@pytest.mark.parametrize(
    ("text", "status", "cause"),
    [("", 0, "no launch was profiled"), (page(), 3, "exit status 3")],
    ids=["profiler", "program"],
)
def test_failures_are_recorded(programs, tmp_path, capsys, text, status, cause):
    programs(text, status)
    output = tmp_path / "x.json"
    with pytest.raises(SystemExit, match="1"):
        hopper_profile.main(["--contenders", "cudnn", "--output", str(output)])
    capsys.readouterr()
    (result,) = json.loads(output.read_text())["results"]
    assert cause in result["error"]
