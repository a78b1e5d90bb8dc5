"""The manifests of deploy/kubernetes: they are what Kubernetes and the External Secrets Operator
take, and what they say about this program is true.
"""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus, urlsplit

import aiohttp
import click
import jsonschema_rs
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from yarl import URL

from flowmason_secrets import __version__, config
from flowmason_secrets.api.routes import ROUTES
from flowmason_secrets.cli import cli
from flowmason_secrets.client import AsyncSecretsClient, Options
from flowmason_secrets.core.note import Signer

from .harness.server import ServerProcess, issue_key, serving
from .test_cli_serve import Certificate

ROOT = Path(__file__).parent.parent
DIRECTORY = ROOT / "deploy" / "kubernetes"
OPERATOR = json.loads((ROOT / "tests/vectors/external-secrets.json").read_text())
MANIFESTS = [
    manifest
    for path in sorted(DIRECTORY.glob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text())
]
# The first with sidecars, and the newest that the validator knows.
VERSIONS = ("1.29", kubernetes_validate.latest_version())


def title(manifest: dict[str, Any]) -> str:
    """What a manifest is."""
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def of_kind(kind: str) -> dict[str, Any]:
    """The manifest of this kind."""
    found: dict[str, Any]
    (found,) = (manifest for manifest in MANIFESTS if manifest["kind"] == kind)
    return found


def pods() -> Iterator[dict[str, Any]]:
    """The specifications of all pods."""
    for manifest in MANIFESTS:
        if "template" in manifest.get("spec", {}):
            yield manifest["spec"]["template"]["spec"]


def containers() -> list[dict[str, Any]]:
    """All containers of all pods."""
    return [one for pod in pods() for one in (*pod["initContainers"], *pod["containers"])]


# --- what Kubernetes takes ----------------------------------------------------------------------


def complaint(manifest: dict[str, Any], version: str) -> str | None:
    """Why a manifest is not taken, if it is not."""
    try:
        if manifest["apiVersion"].startswith("external-secrets.io/"):
            jsonschema_rs.validator_for(OPERATOR).validate(manifest)
        else:
            kubernetes_validate.validate(manifest, version, strict=True)
    except (jsonschema_rs.ValidationError, kubernetes_validate.ValidationError) as error:
        return str(error.message)
    return None


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS, ids=title)
def test_manifests_are_valid(manifest: dict[str, Any], version: str) -> None:
    assert complaint(manifest, version) is None


WRONG: dict[str, tuple[str, str]] = {
    "a probe of another name": ("startupProbe", "startUpProbe"),
    "a misspelt field": ("securityContext", "securitycontext"),
    "a field of another operator": ("jsonPath", "jsonpath"),
    "a policy that is none": ("Retain", "Keep"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_validators_refuse(wrong: str) -> None:
    right, mistake = WRONG[wrong]
    texts = [json.dumps(manifest) for manifest in MANIFESTS]
    changed = [json.loads(text.replace(right, mistake)) for text in texts if right in text]
    assert changed
    assert [title(one) for one in changed if complaint(one, VERSIONS[0]) is None] == []


def test_containers_are_confined() -> None:
    for pod in pods():
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    for container in containers():
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_what_is_mounted_is_there() -> None:
    for manifest in MANIFESTS:
        if "template" not in manifest.get("spec", {}):
            continue
        pod = manifest["spec"]["template"]["spec"]
        claims = manifest["spec"].get("volumeClaimTemplates", ())
        there = {one["name"] for one in pod["volumes"]} | {
            one["metadata"]["name"] for one in claims
        }
        every = [*pod["initContainers"], *pod["containers"]]
        mounted = {mount["name"] for one in every for mount in one["volumeMounts"]}
        assert mounted == there, title(manifest)


# --- what is true of this program ---------------------------------------------------------------


def invocations() -> list[list[str]]:
    """How manifests call the program: in containers of the image, and in probes."""
    called = [one["args"] for one in containers() if "args" in one]
    for container in containers():
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            command = container.get(probe, {}).get("exec", {}).get("command")
            if command:
                assert command[0] == "flowmason-secrets"
                called.append(command[1:])
    return called


def test_commands_and_their_options_exist() -> None:
    assert {arguments[0] for arguments in invocations()} == {"serve", "agent"}
    for name, *arguments in invocations():
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        if isinstance(command, click.Group) and arguments[0] in command.commands:
            command = command.commands[arguments.pop(0)]
        known = {option for one in command.params for option in one.opts}
        used = {one.partition("=")[0] for one in arguments if one.startswith("--")}
        assert used <= known, name


def test_the_image_is_the_one_of_the_dockerfile() -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    tag = f"flowmason-secrets:{__version__}"
    assert f"-t {tag} " in dockerfile
    assert f"-t {tag} " in (ROOT / "README.md").read_text()
    ours = [one for one in containers() if one["name"] != "worker"]
    assert {one["image"] for one in ours} == {tag}
    for pod in pods():
        user = "{runAsUser}:{runAsGroup}".format(**pod["securityContext"])
        assert f"USER {user}\n" in dockerfile
    for copied in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.MULTILINE):
        for name in copied.split():
            assert (ROOT / name).exists()
            assert f"!{name}\n" in (ROOT / ".dockerignore").read_text()


def test_variables_and_probes_exist() -> None:
    known = {config.PREFIX + name for name in config.VARIABLES} | {config.API_KEY}
    open_routes = {route.template for route in ROUTES if not route.scopes}
    for container in containers():
        names = {one["name"] for one in container.get("env", ())}
        assert {name for name in names if name.startswith("FLOWMASON")} <= known
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            get = container.get(probe, {}).get("httpGet")
            assert get is None or get["path"] in open_routes


def test_the_agent_is_a_sidecar() -> None:
    (pod,) = (pod for pod in pods() if pod["containers"][0]["name"] == "worker")
    (agent,) = pod["initContainers"]
    assert agent["restartPolicy"] == "Always"
    probe = agent["startupProbe"]
    wait = probe["exec"]["command"][probe["exec"]["command"].index("--wait") + 1]
    # Kubernetes gives a probe one second, if nothing else is said.
    assert probe["timeoutSeconds"] > int(wait.removesuffix("s"))
    sockets = {one for one in agent["args"] if "sock" in one}
    assert sockets == {one for one in probe["exec"]["command"] if "sock" in one}
    # The worker itself has no API key.
    assert "env" not in pod["containers"][0]


class Pod:
    """The pod of the service on this machine: its paths are directories here, its Secrets files."""

    def __init__(self, place: Path) -> None:
        spec = of_kind("StatefulSet")["spec"]["template"]["spec"]
        self._place = place
        (self._keys,) = spec["initContainers"]
        (self._serves,) = spec["containers"]
        for mount in (*self._keys["volumeMounts"], *self._serves["volumeMounts"]):
            (place / mount["mountPath"].strip("/")).mkdir(exist_ok=True)
        self._variables = {one["name"]: self.here(one["value"]) for one in self._serves["env"]}
        self.certificate = Certificate(place)
        self.signer = Signer("flowmason-secrets/test", os.urandom(32))
        for path, text in {
            "mounted/master.key": "a master key for tests, 32 characters or more\n",
            "mounted/signing.key": f"{self.signer.encode()}\n",
            "tls/tls.crt": self.certificate.path.read_text(),
            "tls/tls.key": self.certificate.key.read_text(),
        }.items():
            # Files of a Secret, as the pod gets them.
            (place / path).write_text(text)
            (place / path).chmod(0o440)

    def here(self, text: str) -> str:
        """A path of the pod, also behind an option, as a path here."""
        head, slash, tail = text.partition("/")
        return f"{head}{self._place}/{tail}" if slash else text

    def copy_keys(self) -> None:
        """Run the first container to its end."""
        subprocess.run([self.here(one) for one in self._keys["command"]], check=True)

    def change_key(self, new: str) -> None:
        """Put another master key first in the Secret, and let the pod have it."""
        mounted = self._place / "mounted/master.key"
        older = mounted.read_text()
        mounted.unlink()
        mounted.write_text(f"{new}\n{older}")
        self.copy_keys()

    def run(self, *arguments: str, stdin: str) -> str:
        """Run the program in the second container; what it prints."""
        return subprocess.run(
            (*_Keyless.program, *arguments),
            env=os.environ | self._variables,
            input=stdin,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout

    def server(self) -> ServerProcess:
        """The second container."""
        _, *arguments = [self.here(one) for one in self._serves["args"]]
        arguments = [one for one in arguments if not one.startswith("--port")]
        data_dir = Path(self._variables["FLOWMASON_SECRETS_DIR"])
        return _Keyless(data_dir, *arguments, **self._variables)


class _Keyless(ServerProcess):
    """Without the master key that servers of tests have in their environment."""

    program = ("env", "-u", "FLOWMASON_SECRETS_KEY", sys.executable, "-m", "flowmason_secrets")


async def test_the_service_starts_as_its_manifest_says(tmp_path: Path) -> None:
    pod = Pod(tmp_path)
    server = pod.server()
    # What Kubernetes mounts is refused: others could read it.
    (tmp_path / "keys/master.key").write_bytes((tmp_path / "mounted/master.key").read_bytes())
    with pytest.raises(AssertionError, match="open to others"):
        await server.start()
    pod.copy_keys()
    server = pod.server()
    await server.start()
    try:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        api_key = await issue_key(tmp_path / "data/secrets", "org")
        options = Options(ca_file=pod.certificate.path)
        async with AsyncSecretsClient(url, api_key, options) as secrets:
            assert (await secrets.status()).status == "ready"
            made = await secrets.set("A", "v")
            assert made.receipt is not None
            note = (await secrets.proof(made.receipt.seq)).decode().partition("\n\n")[2]
    finally:
        await server.stop()
    # The log is signed with the key of the Secret.
    assert pod.signer.name in note
    # Another master key, as the README says; the key files are not written.
    pod.change_key("the second master key of tests, also long enough")
    held = (tmp_path / "keys/master.key").read_text()
    pod.run("rotate-key", "--stdin", stdin=held.partition("\n")[0])
    assert (tmp_path / "keys/master.key").read_text() == held
    shown = json.loads(pod.run("status", "--json", stdin=""))
    assert [(key["secrets"], key["state"]) for key in shown["keys"]] == [(1, "active"), (0, "held")]


# --- what the External Secrets Operator does ----------------------------------------------------


def webhook() -> dict[str, Any]:
    """The store's provider."""
    found: dict[str, Any] = of_kind("ClusterSecretStore")["spec"]["provider"]["webhook"]
    return found


def asked_for(key: str, version: str = "") -> str:
    """The URL that the operator makes of the template: it escapes what it fills in."""
    base, key_action, version_action = (
        "https://flowmason-secrets.flowmason.svc:8700/api/v1/secrets/",
        '{{ .remoteRef.key | replace "+" "%20" }}',
        "{{ with .remoteRef.version }}?version={{ . }}{{ end }}",
    )
    assert webhook()["url"] == base + key_action + version_action
    filled = f"?version={quote_plus(version)}" if version else ""
    return base + quote_plus(key).replace("+", "%20") + filled


def test_the_store_names_what_the_operator_needs() -> None:
    store = webhook()
    url = urlsplit(store["url"].partition("{{")[0])
    service = of_kind("Service")
    # Without a port, it would be checked at 443.
    assert url.port == service["spec"]["ports"][0]["port"]
    assert url.hostname == "{name}.{namespace}.svc".format(**service["metadata"])
    secret = of_kind("Secret")
    assert secret["metadata"]["labels"] == {"external-secrets.io/type": "webhook"}
    (given,) = store["secrets"]
    for reference in (given["secretRef"], store["caProvider"]):
        # A store of the whole cluster has no namespace of its own.
        assert reference["namespace"] == secret["metadata"]["namespace"]
    assert given["secretRef"]["name"] == secret["metadata"]["name"]
    (key,) = secret["stringData"]
    assert store["headers"] == {"Authorization": f'Bearer {{{{ index .{given["name"]} "{key}" }}}}'}
    assert store["result"] == {"jsonPath": "$.value"}
    wanted = of_kind("ExternalSecret")["spec"]
    assert wanted["secretStoreRef"]["name"] == of_kind("ClusterSecretStore")["metadata"]["name"]


async def test_the_service_answers_what_the_operator_asks(data_dir: Path) -> None:
    limited = await issue_key(data_dir, allow=("O*",))
    async with serving(data_dir) as server, contextlib.AsyncExitStack() as stack:
        full = await stack.enter_async_context(
            AsyncSecretsClient(server.url, await issue_key(data_dir))
        )
        client = await stack.enter_async_context(aiohttp.ClientSession())

        async def ask(key: str, version: str = "", api_key: str = limited) -> tuple[int, Any]:
            path = asked_for(key, version).partition(":8700")[2]
            headers = {"Authorization": f"Bearer {api_key}"}
            url = URL(server.url + path, encoded=True)
            async with client.get(url, headers=headers) as answer:
                return answer.status, (await answer.json(content_type=None)).get("value")

        for name in ("OPENAI_API_KEY", "O a+b%c&d?e#ü"):
            await full.set(name, f"value of {name}")
            assert await ask(name) == (200, f"value of {name}")
        # An empty value is a text too.
        await full.set("O-empty", "")
        assert await ask("O-empty") == (200, "")
        # 404 makes the operator take a secret for deleted, so it means just that.
        assert (await ask("O-absent"))[0] == 404
        await full.set("X", "v")
        await full.set("O-old", "v", expires_at="2001-01-01T00:00:00Z")
        refusals = await asyncio.gather(
            ask("X"), ask("O-old"), ask("OPENAI_API_KEY", "3"), ask("O-absent", api_key="fm_wrong")
        )
        assert [status for status, _ in refusals] == [403, 410, 422, 401]
