"""What source code here must not do, as rules on its syntax tree: `broken_rules(source)` names the lines that do."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

# Modules that read code from data, unpack archives, or hide what is run.
FORBIDDEN_MODULES = {
    *("dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "xmlrpc", "telnetlib", "ftplib"),
    *("zipfile", "tarfile", "tempfile.mktemp", "urllib.request", "imp"),
}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "os.system", "os.popen", "shutil.unpack_archive"),
    *("tempfile.mktemp", "pd.read_pickle", "os.chmod", "os.umask", "torch.hub.load", "ssl._create_unverified_context"),
}
# Keywords that are allowed one value only, wherever they occur.
ONLY = {"trust_remote_code": False, "allow_pickle": False, "shell": False, "verify": True, "weights_only": True}
# from_pretrained of these reads no weights, or (PEFT's) takes the safetensors file that is there.
WITHOUT_WEIGHTS = {"FlowMatchEulerDiscreteScheduler", "kind", "PeftModel"}
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute access, the parts that can be named."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def keywords(call: ast.Call) -> dict[str, object]:
    """The call's keywords with their values, where these are constants."""
    return {k.arg: k.value.value if isinstance(k.value, ast.Constant) else ... for k in call.keywords if k.arg}


def _imports(node: ast.AST) -> Iterator[str]:
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        if f"{node.module}" in ("pickle", "os") and {alias.name for alias in node.names} & {"load", "loads", "system"}:
            yield f"imports {names[-1]}"
    yield from (f"imports {name}" for name in names if {name, name.split(".")[0]} & FORBIDDEN_MODULES)


def _calls(node: ast.AST) -> Iterator[str]:
    if not isinstance(node, ast.Call):
        return
    name, given = dotted(node.func), keywords(node)
    if name in FORBIDDEN_NAMES | FORBIDDEN_CALLS:
        yield f"calls {name}"
    if name == "torch.load" and given.get("weights_only") is not True:
        yield "calls torch.load without weights_only=True"
    for key, value in given.items():
        if key in ONLY and value is not ONLY[key]:
            yield f"passes {key} other than {ONLY[key]}"


def _weights(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
        spread = any(keyword.arg is None for keyword in node.keywords)  # **common
        if dotted(node.func.value) not in WITHOUT_WEIGHTS and not spread:
            if keywords(node).get("use_safetensors") is not True:
                yield "calls from_pretrained without use_safetensors=True"


def _network(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::"):
        yield "names an address of all interfaces"
    if not isinstance(node, ast.Call):
        return
    name, given = dotted(node.func), keywords(node)
    if name.split(".")[0] == "requests" and name.count(".") == 1 and name.split(".")[1] in (
        *("get", "post", "put", "head", "delete", "patch", "request"),
    ):  # fmt: skip
        if "timeout" not in given:
            yield f"calls {name} without a timeout"
    if name.endswith((".bind", "HTTPServer")) and node.args and isinstance(node.args[0], ast.Tuple):
        host = node.args[0].elts[0]
        if not (isinstance(host, ast.Constant) and host.value in LOOPBACK):
            yield "listens elsewhere than on the loopback interface"


def _python(node: ast.AST) -> Iterator[str]:
    """Python files that are run: the places that do it are known, and named by the tests."""
    if isinstance(node, ast.Call):
        name = dotted(node.func)
        if name.startswith("runpy.") or name in ("importlib.import_module", "import_module") or "exec_module" in name:
            yield f"runs Python by {name}"


RULES: tuple[Callable[[ast.AST], Iterator[str]], ...] = (_imports, _calls, _weights, _network, _python)


def broken_rules(source: str) -> list[str]:
    """`line N <what it does>` for everything in the source that is forbidden."""
    return [
        f"line {node.lineno} {what}" for node in ast.walk(ast.parse(source)) for rule in RULES for what in rule(node)
    ]
