"""The recipes that come with the package, by name. Imports nothing heavy: the command that lists
them answers at once."""

from pathlib import Path

FOLDER = Path(__file__).parent.parent / "recipes"


def shipped() -> dict[str, str]:
    """Of each recipe its text, whose first line says what it is for."""
    return {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.yaml"))}


def recipe_text(path: Path) -> str:
    """Of a file or, where no file has that name, of a shipped recipe. Raises OSError."""
    return path.read_text() if path.is_file() else shipped().get(str(path)) or path.read_text()
