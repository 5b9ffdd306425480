"""Facts about the source tree that several rule tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def tracked(pattern: str) -> list[Path]:
    """Files of the source tree below ROOT that match, without build outputs."""
    skip = {"build", "runs", "dist"}
    return sorted(
        path
        for path in ROOT.glob(pattern)
        if path.is_file() and not (set(path.relative_to(ROOT).parts) & skip or path.relative_to(ROOT).parts[0][0] == ".")
    )


def ops() -> list[str]:
    """Every op, by the file that makes it one."""
    return sorted(path.stem for path in (ROOT / "pyengine/ops").glob("[!_]*.py"))
