"""Finding recipes: by path, then by name in ./configs/recipe/ of the working directory, then in the package."""

from __future__ import annotations

from pathlib import Path

from crossguard.configs.errors import UserError
from crossguard.configs.suggest import did_you_mean, nearest

PACKAGE = Path(__file__).parent
YAML_ENDINGS = (".yaml", ".yml")


def own_configs() -> Path | None:
    """The `configs` folder of the working directory, when there is one beside the package's own."""
    folder = Path.cwd() / "configs"
    return folder if folder.is_dir() and folder.resolve() != PACKAGE.resolve() else None


def available_recipes() -> dict[str, Path]:
    """Every recipe that can be named: name -> file; the working directory's hide the package's."""
    folders = [PACKAGE / "recipe", *([own / "recipe"] if (own := own_configs()) else [])]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of the recipe called `name`, or at the path `name`.

    Raises:
        UserError: there is none; the message has the nearest name.
    """
    if name.endswith(YAML_ENDINGS):
        path = Path(name)
        if not path.is_file():
            beside = {file.stem: file for file in path.parent.glob("*") if file.suffix in YAML_ENDINGS}
            match = nearest(path.stem, beside)
            hint = f"; did you mean '{beside[match]}'?" if match else ""
            raise UserError(f"recipe={name}: no such file{hint}")
        return path
    recipes = available_recipes()
    if name not in recipes:
        raise UserError(f"recipe={name}: no such recipe; {did_you_mean(name, recipes)}")
    return recipes[name]
