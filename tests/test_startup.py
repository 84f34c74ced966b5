"""What an interpreter does until Ray's module is there, and what calling Ray's function does."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support.servers import PATIENCE, Server

import ray_valkey_spill
from ray_valkey_spill import _startup
from ray_valkey_spill.errors import ConfigError

SOURCE = Path(__file__).parents[1] / "ray_valkey_spill"
PTH = SOURCE / "ray_valkey_spill.pth"
START = SOURCE / "ray_valkey_spill.start"

# From Python 3.15 on it is `ray_valkey_spill.start` that counts, which does import the package.
only_with_pth = pytest.mark.skipif(sys.version_info >= (3, 15), reason="has .start files")

# What subprocesses begin with. `argv` are the .pth file and where the package is imported from,
# which an interpreter without site-packages has to be told.
PRELUDE = """\
import os, sys
pth, package_parent = sys.argv[1:3]
def finders():
    return [f for f in sys.meta_path if getattr(f, "__name__", "") == "RayValkeySpillFinder"]
with open(pth, encoding="ascii") as file:
    pth_lines = [line for line in file if line.startswith("import ")]
def run_pth():
    for line in pth_lines:
        exec(line)
def ours():
    return {name for name in sys.modules if name.partition(".")[0] == "ray_valkey_spill"}
"""

BASE = """
class ExternalStorage:
    def _get_objects_from_store(self, object_refs):
        ...
    def _put_object_to_store(self, metadata, data_size, file_like, object_ref, owner_address):
        ...
"""
OWN = "the fake's own"
FUNCTION = f"""
def setup_external_storage(config, node_id, session_name):
    return {OWN!r}, config, node_id, session_name
"""
GLOBAL = "_external_storage = None\n"
FAKE = BASE + FUNCTION + GLOBAL

INCOMPATIBLE = {
    "no function": (BASE + GLOBAL, ["setup_external_storage()"]),
    "other parameters": (
        BASE + GLOBAL + FUNCTION.replace("session_name", "cluster_name"),
        ["setup_external_storage(config, node_id, session_name)"],
    ),
    "no _put_object_to_store": (
        FAKE.replace("_put_object_to_store", "_put"),
        ["ExternalStorage._put_object_to_store()"],
    ),
    "no ExternalStorage": (
        FUNCTION + GLOBAL,
        ["ExternalStorage._get_objects_from_store()", "ExternalStorage._put_object_to_store()"],
    ),
    "no global": (BASE + FUNCTION, ["_external_storage"]),
}


def python(code: str, *flags: str, fake: Path | None = None, **env: str) -> str:
    """What `code` prints in a fresh interpreter, which must succeed and keep silent on stderr."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | env
    if fake is not None:
        environ["PYTHONPATH"] = str(fake)
    package_parent = str(Path(ray_valkey_spill.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *flags, "-c", PRELUDE + textwrap.dedent(code), str(PTH), package_parent],
        env=environ,
        cwd="/",  # a checkout must not be importable by being the current directory
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


def fake_ray(directory: Path, external_storage: str) -> Path:
    """Where a package named ray lies, whose external_storage has this source."""
    private = directory / "ray" / "_private"
    private.mkdir(parents=True)
    (private / "__init__.py").touch()
    (private / "external_storage.py").write_text(external_storage)
    (private.parent / "__init__.py").write_text('__version__ = "9.9.9"\n')
    return directory


@pytest.fixture
def ray_module() -> Iterator[ModuleType]:
    """Ray's module as this process has it, without a storage after the test."""
    module = importlib.import_module(_startup.RAY_MODULE)
    yield module
    module.reset_external_storage()


# --- at start ---


@pytest.mark.parametrize("flag", ["", "-I", "-E", "-s"])
def test_a_fresh_interpreter_has_the_finder_and_prints_nothing(flag: str) -> None:
    assert python("assert len(finders()) == 1", *flag.split()) == ""


@only_with_pth
def test_a_fresh_interpreter_has_imported_neither_ray_nor_this_package() -> None:
    heavy = ("ray", "pyarrow", "valkey", "numpy", "lz4", "xxhash", "click", "ray_valkey_spill")
    code = f"assert not {{name.partition('.')[0] for name in sys.modules}} & set({heavy})"
    python(code)


def test_the_pth_line_imports_nothing() -> None:
    code = """
    before = set(sys.modules)
    run_pth()
    assert len(finders()) == 1
    assert set(sys.modules) == before
    """
    python(code, "-I", "-S")


def test_the_modules_of_the_hook_load_nothing_but_themselves() -> None:
    code = """
    sys.path.insert(0, package_parent)
    before = set(sys.modules)
    import ray_valkey_spill._startup
    assert set(sys.modules) - before == {"ray_valkey_spill", "ray_valkey_spill._startup"}
    """
    python(code, "-I", "-S")


@only_with_pth
def test_imports_other_than_of_rays_module_do_not_load_this_package(tmp_path: Path) -> None:
    code = """
    import json.tool, ray._private
    assert not ours()
    import ray._private.external_storage
    assert ours() == {"ray_valkey_spill", "ray_valkey_spill._startup"}
    """
    python(code, fake=fake_ray(tmp_path, FAKE))


def test_without_site_packages_nothing_happens() -> None:
    python("assert not finders() and not ours()", "-S")


def test_a_pth_that_outlives_the_package_leaves_ray_alone(tmp_path: Path) -> None:
    code = f"""
    run_pth()
    sys.path.insert(0, {str(fake_ray(tmp_path, FAKE))!r})
    import ray._private.external_storage as module
    assert module.setup_external_storage({{"type": "valkey"}}, "ab", "s")[0] == {OWN!r}
    """
    python(code, "-I", "-S")


# --- doing it twice ---


@pytest.mark.parametrize("first", ["run_pth", "install"])
def test_there_is_one_finder_however_often_it_is_put_there(first: str) -> None:
    code = f"""
    sys.path.insert(0, package_parent)
    from ray_valkey_spill._startup import install, is_installed
    assert not finders() and not is_installed()
    for put in ({first}, run_pth, run_pth, install, install, run_pth):
        put()
        assert len(finders()) == 1 and is_installed()
    """
    python(code, "-I", "-S")


def test_either_finder_has_rays_function_wrapped_once(tmp_path: Path) -> None:
    code = f"""
    sys.path[:0] = [{str(fake_ray(tmp_path, FAKE))!r}, package_parent]
    from ray_valkey_spill._startup import RayValkeySpillFinder, install
    run_pth()
    sys.meta_path.insert(0, RayValkeySpillFinder)
    assert len(finders()) == 2
    import ray._private.external_storage as module
    install()
    original = module.setup_external_storage.ray_valkey_spill_original
    assert not hasattr(original, "ray_valkey_spill_original")
    assert original.__module__ == "ray._private.external_storage"
    """
    python(code, "-I", "-S")


def test_install_hooks_a_module_that_is_imported_later(tmp_path: Path) -> None:
    code = f"""
    sys.path[:0] = [{str(fake_ray(tmp_path, FAKE))!r}, package_parent]
    from ray_valkey_spill._startup import install
    install()
    import ray._private.external_storage as module
    assert hasattr(module.setup_external_storage, "ray_valkey_spill_original")
    """
    python(code, "-I", "-S")


def test_install_wraps_a_module_that_is_imported_already_and_once(tmp_path: Path) -> None:
    code = f"""
    sys.path[:0] = [{str(fake_ray(tmp_path, FAKE))!r}, package_parent]
    import ray._private.external_storage as module
    from ray_valkey_spill._startup import install, is_installed
    own = module.setup_external_storage
    assert not is_installed()
    for _ in range(3):
        install()
        assert is_installed() and not finders()
        assert module.setup_external_storage.ray_valkey_spill_original is own
        assert not hasattr(own, "ray_valkey_spill_original")
    """
    python(code, "-I", "-S")


# --- switched off ---


@pytest.mark.parametrize("value", ["1", "true"])
def test_switched_off_ray_refuses_the_type_itself(value: str) -> None:
    code = """
    import ray._private.external_storage as module
    assert not hasattr(module.setup_external_storage, "ray_valkey_spill_original")
    try:
        module.setup_external_storage({"type": "valkey", "params": {}}, "ab", "s")
    except ValueError as error:
        print(type(error).__name__, error)
    """
    printed = python(code, RAY_VALKEY_SPILL_DISABLE=value)
    assert printed == "ValueError Unknown external storage type: valkey\n"


@pytest.mark.parametrize(
    ("value", "wrapped"),
    [("1", False), ("TRUE", False), ("yes", False), ("", True), ("0", True), ("false", True)],
)
def test_what_switches_it_off(tmp_path: Path, value: str, wrapped: bool) -> None:
    code = f"""
    import ray._private.external_storage as module
    from ray_valkey_spill._startup import install
    install()
    assert hasattr(module.setup_external_storage, "ray_valkey_spill_original") is {wrapped}
    """
    python(code, fake=fake_ray(tmp_path, FAKE), RAY_VALKEY_SPILL_DISABLE=value)


# --- with Ray ---


def test_rays_function_is_wrapped_once(ray_module: ModuleType) -> None:
    wrapper = ray_module.setup_external_storage
    original = wrapper.ray_valkey_spill_original
    assert original.__module__ == _startup.RAY_MODULE
    assert not hasattr(original, "ray_valkey_spill_original")
    assert wrapper.__doc__ == original.__doc__
    assert _startup.is_installed()


def test_the_type_valkey_makes_a_storage_and_leaves_it_where_ray_looks(
    ray_module: ModuleType, server: Server
) -> None:
    config = {"type": "valkey", "params": {"url": server.url}}
    for arguments in (
        ([config, "ab" * 28, "session"], {}),
        ([], {"config": config, "node_id": "ab" * 28, "session_name": "session"}),
    ):
        storage = ray_module.setup_external_storage(*arguments[0], **arguments[1])
        storage.destroy_external_storage()
        assert type(storage) is ray_valkey_spill.ValkeyStorage
        assert ray_module._external_storage is storage


@pytest.mark.parametrize("by_keyword", [False, True])
def test_other_types_are_still_rays(
    ray_module: ModuleType, tmp_path: Path, by_keyword: bool
) -> None:
    config = {"type": "filesystem", "params": {"directory_path": str(tmp_path)}}
    if by_keyword:
        storage = ray_module.setup_external_storage(config=config, node_id="ab", session_name="s")
    else:
        storage = ray_module.setup_external_storage(config, "ab", "s")
    assert type(storage) is ray_module.FileSystemStorage
    assert ray_module._external_storage is storage
    assert [path.name.endswith("ab") for path in tmp_path.iterdir()] == [True]
    storage.destroy_external_storage()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", [{}, None])
def test_no_config_is_still_rays_null_storage(
    ray_module: ModuleType, config: dict[str, object] | None, tmp_path: Path
) -> None:
    files = {"type": "filesystem", "params": {"directory_path": str(tmp_path)}}
    ray_module.setup_external_storage(files, "ab", "s").destroy_external_storage()
    assert type(ray_module.setup_external_storage(config, "ab", "s")) is ray_module.NullStorage
    assert type(ray_module._external_storage) is ray_module.NullStorage


def test_an_unknown_type_is_still_rays_error(ray_module: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"^Unknown external storage type: valkeys$"):
        ray_module.setup_external_storage({"type": "valkeys", "params": {}}, "ab", "s")


def test_the_source_of_rays_module_can_be_read(ray_module: ModuleType) -> None:
    assert "def setup_external_storage(" in inspect.getsource(ray_module)


@pytest.mark.parametrize("real", [True, False])
def test_a_module_that_was_looked_for_first_is_hooked_when_it_is_imported(
    tmp_path: Path, real: bool
) -> None:
    code = f"""
    import importlib.util
    spec = importlib.util.find_spec("ray._private.external_storage")
    # To look for it Ray's packages are imported, and the real ones import the module, too.
    assert ("ray._private.external_storage" in sys.modules) is {real}
    import ray._private.external_storage as module
    assert spec.origin == module.__file__
    own = module.setup_external_storage.ray_valkey_spill_original
    assert not hasattr(own, "ray_valkey_spill_original")
    """
    python(code, fake=None if real else fake_ray(tmp_path, FAKE))


def test_a_reloaded_module_is_hooked_once_again() -> None:
    code = """
    import importlib
    import ray._private.external_storage as module
    wrapper = module.setup_external_storage
    assert importlib.reload(module) is module
    assert module.setup_external_storage is not wrapper
    own = module.setup_external_storage.ray_valkey_spill_original
    assert own is not wrapper and not hasattr(own, "ray_valkey_spill_original")
    assert own.__module__ == "ray._private.external_storage"
    """
    python(code)


@pytest.fixture
def _no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For configs that are to be refused: one that is not must not reach some server here."""
    monkeypatch.setenv("RAY_VALKEY_SPILL_URL", f"unix://{tmp_path}/none")
    monkeypatch.setenv("RAY_VALKEY_SPILL_RETRY_TIMEOUT", "0")


@pytest.mark.usefixtures("_no_server")
@pytest.mark.parametrize(
    ("params", "kind"),
    [
        *(([1], "an array"), ([], "an array"), ("url", "a string"), ("", "a string")),
        *((1, "a number"), (True, "true or false"), (False, "true or false")),
    ],
    ids=repr,
)
def test_params_that_are_no_object_are_refused(
    ray_module: ModuleType, params: object, kind: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^params must be a JSON object, not {kind}$"):
        ray_module.setup_external_storage({"type": "valkey", "params": params}, "ab", "s")


@pytest.mark.usefixtures("_no_server")
@pytest.mark.parametrize("params", [{}, {"params": {}}, {"params": None}])
def test_parameters_beside_params_are_refused(
    ray_module: ModuleType, params: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match=r"'namespace' beside .* inside 'params'"):
        ray_module.setup_external_storage({"type": "valkey", "namespace": "n", **params}, "ab", "s")


# They run into the arguments that the storage has from Ray.
@pytest.mark.usefixtures("_no_server")
@pytest.mark.parametrize("name", ["node_id", "session_name", "self"])
def test_params_named_like_rays_arguments_are_refused(ray_module: ModuleType, name: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown parameter '{name}'"):
        ray_module.setup_external_storage({"type": "valkey", "params": {name: "x"}}, "ab", "s")


# --- with a Ray of another shape ---


@pytest.mark.parametrize("case", INCOMPATIBLE)
def test_a_ray_of_another_shape_is_refused_by_the_names_of_what_it_lacks(
    tmp_path: Path, case: str
) -> None:
    source, missing = INCOMPATIBLE[case]
    code = """
    import ray._private.external_storage as module
    from ray_valkey_spill.errors import IncompatibleRayError
    try:
        module.setup_external_storage({"type": "valkey", "params": {}}, "ab", "s")
    except IncompatibleRayError as error:
        print(error)
    """
    message = python(code, fake=fake_ray(tmp_path, source))
    assert "Ray 9.9.9:" in message
    assert f"ray-valkey-spill {ray_valkey_spill.__version__} " in message
    what, _, _ = message.partition(". Upgrade")
    assert what.endswith(f"has no {', no '.join(missing)}")


@pytest.mark.parametrize("case", INCOMPATIBLE)
def test_a_ray_of_another_shape_imports_in_silence_and_keeps_its_own_types(
    tmp_path: Path, case: str
) -> None:
    code = """
    import ray._private.external_storage as module
    try:
        print(module.setup_external_storage({"type": "filesystem"}, "ab", "s"))
    except AttributeError as error:
        print(error)
    """
    printed = python(code, fake=fake_ray(tmp_path, INCOMPATIBLE[case][0]))
    if case == "no function":
        missing = "'ray._private.external_storage' has no attribute 'setup_external_storage'"
        assert printed == f"module {missing}\n"
    else:
        assert printed == f"{(OWN, {'type': 'filesystem'}, 'ab', 's')}\n"


def test_a_module_that_fails_to_import_raises_its_own_error_and_stays_hooked(
    tmp_path: Path,
) -> None:
    fails_once = "import sys\nif not hasattr(sys, 'ready'):\n    raise OSError('not ready')\n"
    code = """
    try:
        import ray._private.external_storage
    except OSError as error:
        print(error)
    assert "ray._private.external_storage" not in sys.modules
    sys.ready = True
    import ray._private.external_storage as module
    own = module.setup_external_storage.ray_valkey_spill_original
    assert not hasattr(own, "ray_valkey_spill_original")
    """
    assert python(code, fake=fake_ray(tmp_path, fails_once + FAKE)) == "not ready\n"


# --- the files ---


def test_the_pth_has_one_line_of_the_kind_that_site_executes() -> None:
    lines = [
        line
        for line in PTH.read_text("ascii").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert len(lines) == 1
    assert lines[0].startswith("import ")


def test_the_start_file_names_a_function_that_exists() -> None:
    entries = START.read_text("ascii").split()
    assert entries == ["ray_valkey_spill._startup:install"]
    assert pkgutil.resolve_name(entries[0]) is _startup.install


# --- the public names ---


def test_the_public_names() -> None:
    assert ray_valkey_spill.__all__ == [
        "ValkeyStorage",
        "__version__",
        "spilling_config",
        "system_config",
    ]
    assert set(ray_valkey_spill.__all__) <= set(dir(ray_valkey_spill))


@pytest.mark.parametrize("name", ray_valkey_spill.__all__)
def test_a_public_name_is_what_its_module_calls_so(name: str) -> None:
    value = getattr(ray_valkey_spill, name)
    assert name == "__version__" or value.__name__ == name
    # A second look must not go through the import again.
    assert vars(ray_valkey_spill)[name] is value


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'ray_valkey_spill' .* 'ValkeyStore'"):
        _ = ray_valkey_spill.ValkeyStore
