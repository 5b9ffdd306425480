"""Facts about the source tree that several rule tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def tracked(pattern: str) -> list[Path]:
    """Files of the source tree below ROOT that match, without build outputs."""
    skip = {"build", "runs", "dist", "__pycache__"}

    def kept(path: Path) -> bool:
        parts = path.relative_to(ROOT).parts
        return path.is_file() and not skip.intersection(parts) and not parts[0].startswith(".")

    return sorted(path for path in ROOT.glob(pattern) if kept(path))


def ops() -> list[str]:
    """Every op, by the file that makes it one."""
    return sorted(path.stem for path in (ROOT / "pyengine/ops").glob("[!_]*.py"))
