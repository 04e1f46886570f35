"""The pages' Python runs, their commands exist, the protocol is Triton's, and the deployment's files fit the command line."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
import typer
import yaml

from phaseline.clients.__main__ import build_app
from phaseline.clients.kserve import Tls
from phaseline.clients.publish import list_recipes, served_bundle
from phaseline.clients.segmenter import Segmenter
from phaseline.runtime.bundle import Bundle
from phaseline.runtime.errors import ServerUnavailableError
from phaseline.runtime.source import PIXEL_BYTES
from phaseline.triton_models.listening import Listening
from phaseline.triton_models.repository import Deployment
from phaseline.triton_models.server import STOP_TIMEOUT_S, TritonServer
from tests.serving import frame

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
PROTO, PLAIN = DOCS / "examples" / "kserve_v2.proto", DOCS / "examples" / "plain_grpc.py"


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language; the empty one: of none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [content for name, content in found if name == language]


def commands(text: str) -> list[list[str]]:
    """The words of each `phaseline` command in a script or in a YAML comment."""
    text = re.sub(r"\\\n(#\s+)?", " ", text)
    return [shlex.split(line)[1:] for line in re.findall(r"^(?:#\s+)?(phaseline (?!in ).*[^.:])$", text, re.MULTILINE)]


def parse(words: list[str]) -> dict[str, Any]:
    """What a command is given; raises an error if it has not such an option."""
    group: Any = typer.main.get_command(build_app())
    parsed: dict[str, Any] = group.commands[words[0]].make_context(words[0], words[1:]).params
    return parsed


# The protocol and the client made from it.


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the modules and the descriptors that protoc makes of the example's protocol."""
    pytest.importorskip("grpc_tools", reason="needs grpcio-tools: pip install '.[test]'")
    folder = tmp_path_factory.mktemp("compiled")
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO.parent}", f"--python_out={folder}",
                    f"--grpc_python_out={folder}", f"--descriptor_set_out={folder / 'descriptors'}", str(PROTO)], check=True)
    return folder


def fields(message: Any) -> dict[str, tuple[Any, ...]]:
    """Number, type, repetition and choice of a message's fields, its nested messages' included, by name."""
    found = {f"{message.name}.{field.name}": (field.number, field.type, field.label, field.type_name,
                                              field.HasField("oneof_index")) for field in message.field}
    for nested in message.nested_type:
        found |= {f"{message.name}.{name}": content for name, content in fields(nested).items()}
    return found


def test_protocol_is_tritons(compiled: Path) -> None:
    from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
    from tritonclient.grpc import service_pb2

    (ours,) = FileDescriptorSet.FromString((compiled / "descriptors").read_bytes()).file
    theirs = FileDescriptorProto()
    service_pb2.DESCRIPTOR.CopyToProto(theirs)
    assert (ours.package, ours.syntax) == (theirs.package, theirs.syntax)
    messages = {message.name: fields(message) for message in theirs.message_type}
    for message in ours.message_type:
        assert fields(message) == messages[message.name], message.name
    assert {"ModelInferRequest", "ModelInferResponse"} <= {message.name for message in ours.message_type}
    (service,), (known,) = ours.service, theirs.service
    assert service.name == known.name
    procedures = {method.name: (method.input_type, method.output_type, method.client_streaming, method.server_streaming)
                  for method in known.method}
    for method in service.method:
        assert (method.input_type, method.output_type, False, False) == procedures[method.name], method.name
    assert {method.name for method in service.method} == {"ServerReady", "ModelReady", "ModelMetadata", "ModelInfer"}


def plain(compiled: Path, *words: str) -> subprocess.CompletedProcess[str]:
    code = f"import runpy, sys; sys.path.insert(0, {str(compiled)!r}); sys.argv[0] = 'plain_grpc.py'; " \
           f"runpy.run_path({str(PLAIN)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.triton
def test_plain_client_gets_the_embedded_labels(
    compiled: Path, server: TritonServer, tiny_bundle: Bundle, recipes: dict[str, Path], tmp_path: Path
) -> None:
    image = frame(11, 70, 90)
    raw, out = tmp_path / "frame.raw", tmp_path / "labels.raw"
    image.astype("<u2").tofile(raw)
    ended = plain(compiled, str(raw), "70", "90", "--server", server.address, "--model", "segment_deep", "--out", str(out))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"{out}: UINT8 of shape [70, 90], version 1, id frame.raw-")
    with Segmenter.open(recipes["deep"], bundle=tiny_bundle.path, device="cpu") as segmenter:
        expected = segmenter.segment(image).labels
    assert len(np.unique(expected)) == 2
    np.testing.assert_array_equal(np.fromfile(out, np.uint8).reshape(70, 90), expected)


@pytest.mark.triton
def test_plain_client_says_what_failed(compiled: Path, server: TritonServer, tmp_path: Path) -> None:
    raw, out = tmp_path / "frame.raw", tmp_path / "labels.raw"
    frame(11, 70, 90).tofile(raw)
    ended = plain(compiled, str(raw), "70", "90", "--server", server.address, "--model", "segment_no", "--out", str(out))
    assert ended.returncode == 1
    assert re.fullmatch(r"\S+, segment_no, request frame\.raw-\d+: NOT_FOUND: .*unknown model.*\n", ended.stderr)
    ended = plain(compiled, str(raw), "70", "91", "--server", server.address, "--model", "segment_deep", "--out", str(out))
    assert ended.returncode == 2
    assert "holds 12600 bytes, expected 2 × 70 × 91" in ended.stderr
    assert not out.exists()


def test_plain_client_gives_up_at_its_deadline(compiled: Path, tmp_path: Path) -> None:
    raw = tmp_path / "frame.raw"
    raw.write_bytes(bytes(2))
    ended = plain(compiled, str(raw), "1", "1", "--server", "127.0.0.1:1", "--model", "segment_deep", "--out",
                  str(tmp_path / "labels.raw"), "--timeout", "1.2")
    assert ended.returncode == 1
    assert re.search(r"UNAVAILABLE|DEADLINE_EXCEEDED", ended.stderr)


def test_plain_client_needs_grpc_and_protobuf_only(compiled: Path) -> None:
    code = f"import sys; sys.path[:0] = [{str(compiled)!r}, {str(PLAIN.parent)!r}]; import plain_grpc; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"grpc", "google.protobuf", "kserve_v2_pb2"} <= set(loaded)
    assert {"numpy", "phaseline", "tritonclient"}.isdisjoint(name.partition(".")[0] for name in loaded)


# The pages.


SNIPPETS = [pytest.param(text, id=f"{page.stem}-{i}") for page in PAGES for i, text in enumerate(blocks(page, "python"))]


@pytest.mark.triton
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_runs(snippet: str, server: TritonServer, recipes: dict[str, Path], tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "frame.tif", frame(12))
    (tmp_path / "recipe").symlink_to(recipes["deep"])
    assert "127.0.0.1:8001" in snippet
    code = snippet.replace("127.0.0.1:8001", server.address).replace('"cells"', '"deep"')
    ended = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                           check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout
    assert "late" not in ended.stdout
    assert "failed" not in ended.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist(page: Path) -> None:
    for words in [words for language in ("", "bash") for text in blocks(page, language) for words in commands(text)]:
        parse(words)


def test_commands_are_found_and_wrong_ones_noticed() -> None:
    assert len([words for text in blocks(DOCS / "serving.md", "") for words in commands(text)]) >= 6
    with pytest.raises(Exception, match="--no-such-option"):
        parse(["serve", "default", "--no-such-option"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        linked = page if not path else page.parent / path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], target


@pytest.mark.triton
def test_metrics_are_tritons(server: TritonServer) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.ports['metrics']}/metrics", timeout=5) as answer:
        known = answer.read().decode()
    page = (DOCS / "operating.md").read_text(encoding="utf-8")
    # Metrics of GPUs are there with a GPU only.
    metrics, reasons = set(re.findall(r"`(nv_(?!gpu)\w+)", page)), set(re.findall(r'(reason="\w+")', page))
    assert len(metrics) >= 6
    assert [metric for metric in metrics if f"# TYPE {metric} " not in known] == []
    assert [reason for reason in reasons if reason not in known] == []


def test_picture_is_whole() -> None:
    texts = [element.text for element in ElementTree.parse(DOCS / "pictures" / "serving.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert {"segment_NAME", "backbone, features", "recipes"} <= set(texts)


@pytest.mark.triton
@pytest.mark.slow
def test_the_pages_certificates_make_mutual_tls(tiny_bundle: Bundle, needs_triton: None, tmp_path: Path) -> None:
    (script,) = [text for text in blocks(DOCS / "operating.md", "bash") if "openssl" in text]
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, check=True)
    listening = Listening(
        grpc_port=0, http_port=0, metrics_port=0, certificate=tmp_path / "server.pem", key=tmp_path / "server.key",
        client_ca=tmp_path / "ca.pem", publish_key=tmp_path / "publish.key",
    )
    with TritonServer(Deployment(tiny_bundle), listening, log_file=tmp_path / "log") as running:
        address = f"localhost:{running.ports['grpc']}"
        known = Tls(tmp_path / "ca.pem", tmp_path / "client.pem", tmp_path / "client.key")
        assert served_bundle(address, known).digest() == tiny_bundle.hash
        assert list_recipes(address, tls=known) == []
        with pytest.raises(ServerUnavailableError):
            served_bundle(address, Tls(tmp_path / "ca.pem"))


# The deployment's files.


COMPOSE: dict[str, Any] = yaml.safe_load((DOCS / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
MANIFESTS: dict[str, Any] = {
    part["kind"]: part for part in yaml.safe_load_all((DOCS / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8"))}
POD: dict[str, Any] = MANIFESTS["StatefulSet"]["spec"]["template"]["spec"]
SERVERS = {**{f"compose {name}": service["command"] for name, service in COMPOSE["services"].items()},
           "kubernetes": POD["containers"][0]["args"]}
MEGABYTE = {"mb": 1 << 20, "Mi": 1 << 20}


def mounted(words: list[str]) -> dict[str, Path]:
    """Folders that a server's options name, by what they are for."""
    given = parse(words)
    files = [given[name] for name in ("tls_cert", "tls_key", "tls_client_ca", "publish_key")]
    assert len({file.parent for file in files}) == 1
    return {"bundle": Path(given["bundle"]), "secrets": files[0].parent, "store": given["store"]}


@pytest.mark.parametrize("words", SERVERS.values(), ids=SERVERS.keys())
def test_deployed_servers_are_asked_for_rightly(words: list[str]) -> None:
    given = parse(words)
    assert words[0] == "serve"
    assert (given["grpc_port"], given["http_port"], given["metrics_port"]) == (8001, 8000, 8002)
    assert given["bind"] == "0.0.0.0"
    assert None not in (given["tls_client_ca"], given["publish_key"], given["store"])


@pytest.mark.parametrize(("words", "text"), [
    (SERVERS["compose one"], COMPOSE["services"]["one"]["shm_size"]),
    (SERVERS["kubernetes"], next(v["emptyDir"]["sizeLimit"] for v in POD["volumes"] if v["name"] == "shm")),
])
def test_shared_memory_follows_the_rule_of_thumb(words: list[str], text: str) -> None:
    given = parse(words)
    largest_request, at_once = 2 * given["max_pixels"], 4 * given["instances"] * 4
    assert int(text[:-2]) * MEGABYTE[text[-2:]] >= at_once * largest_request + (64 << 20) + (at_once + 1) * PIXEL_BYTES


def test_compose_fits_itself() -> None:
    for name, service in COMPOSE["services"].items():
        volumes = dict(reversed(entry.removesuffix(":ro").split(":")) for entry in service["volumes"])
        assert {str(path) for path in mounted(service["command"]).values()} == set(volumes), name
        assert volumes["/store"] in COMPOSE["volumes"]
        assert {entry.rpartition(":")[2] for entry in service["ports"]} == {"8001", "8002"}
        assert "http://127.0.0.1:8000/v2/health/ready" in service["healthcheck"]["test"][-1]
        assert int(service["stop_grace_period"].removesuffix("s")) > STOP_TIMEOUT_S
    taken = [entry.rpartition(":")[0] for service in COMPOSE["services"].values() for entry in service["ports"]]
    stores = [entry for service in COMPOSE["services"].values() for entry in service["volumes"] if entry.endswith(":/store")]
    assert len(set(taken)) == len(taken)
    assert len(set(stores)) == len(stores)
    for words in commands((DOCS / "deploy" / "compose.yaml").read_text(encoding="utf-8")):
        parse(words)


def test_kubernetes_fits_itself() -> None:
    (container,) = POD["containers"]
    stateful, service = MANIFESTS["StatefulSet"]["spec"], MANIFESTS["Service"]["spec"]
    provided = {volume["name"] for volume in POD["volumes"]} | {
        claim["metadata"]["name"] for claim in stateful["volumeClaimTemplates"]}
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
    assert set(mounts) == provided
    assert mounts == {**mounted(container["args"]), "shm": Path("/dev/shm")}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": 8001, "metrics": 8002}
    assert all(ports[port["name"]] == port["port"] for port in service["ports"])
    assert service["clusterIP"] == "None"
    for probe, path in (("startupProbe", "/v2/health/ready"), ("readinessProbe", "/v2/health/ready"),
                        ("livenessProbe", "/v2/health/live")):
        assert f"http://127.0.0.1:8000{path}" in container[probe]["exec"]["command"][-1]
    labels = stateful["template"]["metadata"]["labels"]
    assert labels == service["selector"] == stateful["selector"]["matchLabels"]
    assert labels == MANIFESTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    assert stateful["serviceName"] == MANIFESTS["Service"]["metadata"]["name"]
    assert stateful["replicas"] > 1
    assert POD["terminationGracePeriodSeconds"] > STOP_TIMEOUT_S


def test_dockerfile_installs_what_exists() -> None:
    text = (DOCS / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for named in re.findall(r"EXTRAS=([a-z,]+)", text):
        assert set(named.split(",")) <= set(extras)
        assert not {"cpu", "gpu"} <= set(named.split(","))
    assert re.search(r"^FROM nvcr\.io/nvidia/tritonserver:", text, re.MULTILINE)
    assert re.search(r"^EXPOSE 8001 8002$", text, re.MULTILINE)
    # No layer keeps the checkout, and keys that lie in it never reach the builder.
    assert not re.search(r"^(COPY|ADD) ", text, re.MULTILINE)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {".git", ".venv", "**/secrets"} <= set(ignored)
    assert re.search(r'^ENTRYPOINT \["phaseline"\]$', text, re.MULTILINE)
