"""Events as the Open Cybersecurity Schema Framework has them: API Activity, class 6003."""

from typing import Any

from .. import __version__
from ..core import times
from ..core.events import Line, Outcome

VERSION = "1.3.0"

_CLASS, _CATEGORY = 6003, 6
_CREATE, _READ, _UPDATE, _DELETE, _OTHER = 1, 2, 3, 4, 99
_ACTIVITIES = {
    "secret.create": _CREATE,
    "secret.read": _READ,
    "secret.metadata": _READ,
    "secret.delete": _DELETE,
    "api_key.create": _CREATE,
    "api_key.list": _READ,
    "api_key.revoke": _DELETE,
    "audit.read": _READ,
    "key.rotate": _UPDATE,
}
_ACTIVITY_NAMES = {_CREATE: "Create", _READ: "Read", _UPDATE: "Update", _DELETE: "Delete"}

# Informational, low, medium: nobody is in danger because somebody was refused.
_SEVERITIES: dict[Outcome, int] = {"success": 1, "not_found": 2, "expired": 2}
_MEDIUM = 3
_SEVERITY_NAMES = {1: "Informational", 2: "Low", 3: "Medium"}

_PRODUCT = {"name": "FlowMason Secrets", "vendor_name": "FlowMason", "version": __version__}


def activity(line: Line) -> dict[str, Any]:
    """The API Activity event that says what a line says. What has no place in it is `unmapped`."""
    activity_id = _ACTIVITIES.get(line["action"], _OTHER)
    if line["details"].get("kind") == "update":
        activity_id = _UPDATE
    succeeded = line["outcome"] == "success"
    severity = _SEVERITIES.get(line["outcome"], _MEDIUM)
    error = None if succeeded else str(line["details"].get("error", line["outcome"]))
    return _without_none(
        {
            "class_uid": _CLASS,
            "class_name": "API Activity",
            "category_uid": _CATEGORY,
            "category_name": "Application Activity",
            "activity_id": activity_id,
            "activity_name": _ACTIVITY_NAMES.get(activity_id, line["action"]),
            "type_uid": _CLASS * 100 + activity_id,
            "severity_id": severity,
            "severity": _SEVERITY_NAMES[severity],
            "status_id": 1 if succeeded else 2,
            "status": "Success" if succeeded else "Failure",
            "status_code": None if line["status"] is None else str(line["status"]),
            "status_detail": error,
            "time": int(times.parse_stored(line["time"]) * 1000),
            "metadata": _metadata(line),
            "actor": _actor(line),
            "api": _api(line, error),
            # Required; whoever works on the data directory itself has no address.
            "src_endpoint": {"ip": line["client_ip"]}
            if line["client_ip"] is not None
            else {"name": "localhost"},
            "http_request": _without_none(
                {"uid": line["request_id"], "user_agent": line["user_agent"]}
            )
            or None,
            "resources": [_resource(line)],
            "unmapped": {"outcome": line["outcome"], "details": line["details"]},
        }
    )


def _metadata(line: Line) -> dict[str, Any]:
    return _without_none(
        {
            "version": VERSION,
            "product": _PRODUCT,
            "uid": line["id"],
            "sequence": line["seq"],
            "original_time": line["time"],
            "log_name": "audit",
            "log_version": str(line["v"]),
            "event_code": line["action"],
            "tenant_uid": line["org_id"],
            "correlation_uid": line["request_id"],
        }
    )


def _actor(line: Line) -> dict[str, Any]:
    if line["actor"] is None:
        return {"app_name": _PRODUCT["name"]}
    user: dict[str, Any] = {"uid": line["actor"], "type": line["actor_type"], "type_id": _OTHER}
    if line["org_id"] is not None:
        user["org"] = {"uid": line["org_id"]}
    return {"user": user}


def _api(line: Line, error: str | None) -> dict[str, Any]:
    api: dict[str, Any] = {
        "operation": line["action"],
        "service": {"name": _PRODUCT["name"]},
    }
    if line["request_id"] is not None:
        api["request"] = {"uid": line["request_id"]}
    if line["status"] is not None:
        api["response"] = _without_none({"code": line["status"], "error": error})
    return api


def _resource(line: Line) -> dict[str, Any]:
    # One of the two is required; the log itself and lists have neither.
    name = line["name"] or line["resource_id"] or line["resource_type"]
    version = None if line["version"] is None else str(line["version"])
    resource = {"type": line["resource_type"], "uid": line["resource_id"], "name": name}
    return _without_none({**resource, "version": version})


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
