"""What the API server says instead of what was asked for: ``Status`` objects, as the real one words them."""

from __future__ import annotations

from collections.abc import Mapping

from .apikinds import Json, Kind

EXPIRED_CONTINUE = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list without "
    "the continue parameter, or use the continue token in this response to retrieve the remainder of the results. "
    "Continuing with the provided token results in an inconsistent list - objects that were created, modified, or "
    "deleted between the time the first chunk was returned and now may show up in the list."
)
_MODIFIED = "the object has been modified; please apply your changes to the latest version and try again"


class StatusError(Exception):
    """
    An answer that is an error.

    :ivar code: the HTTP status.
    :ivar body: the ``Status``; a ``str`` is sent as text/plain.
    :ivar headers: sent beside the usual ones.
    :ivar delay: seconds that the answer takes.
    """

    def __init__(self, code: int, body: Json | str, headers: Mapping[str, str] | None = None, delay: float = 0) -> None:
        super().__init__(body if isinstance(body, str) else body.get("message"))
        self.code = code
        self.body = body
        self.headers = dict(headers or {})
        self.delay = delay


def status(code: int, reason: str, message: str, details: Json | None = None, metadata: Json | None = None) -> Json:
    """A Status of a failure; fields in the order in which Go writes them, those that are empty left out."""
    it: Json = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": metadata or {},
        "status": "Failure",
        "message": message,
    }
    if reason:
        it["reason"] = reason
    if details is not None:
        it["details"] = details
    return {**it, "code": code}


def failure(
    code: int, reason: str, message: str, details: Json | None = None, metadata: Json | None = None
) -> StatusError:
    return StatusError(code, status(code, reason, message, details, metadata))


def notFound(kind: Kind, name: str) -> StatusError:
    return failure(404, "NotFound", f'{_qualified(kind)} "{name}" not found', _details(kind, name))


def alreadyExists(kind: Kind, name: str) -> StatusError:
    return failure(409, "AlreadyExists", f'{_qualified(kind)} "{name}" already exists', _details(kind, name))


def conflict(kind: Kind, name: str, problem: str = _MODIFIED) -> StatusError:
    text = f'Operation cannot be fulfilled on {_qualified(kind)} "{name}": {problem}'
    return failure(409, "Conflict", text, _details(kind, name))


def noResource() -> StatusError:
    return failure(404, "NotFound", "the server could not find the requested resource", {})


def noMethod() -> StatusError:
    text = "the server does not allow this method on the requested resource"
    return failure(405, "MethodNotAllowed", text, {})


def badRequest(message: str) -> StatusError:
    return failure(400, "BadRequest", message)


def unauthorized() -> StatusError:
    return failure(401, "Unauthorized", "Unauthorized")


def forbidden(user: str, verb: str, kind: Kind | None, plural: str, namespace: str, name: str) -> StatusError:
    group = kind.group if kind else ""
    scope = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
    what = f'{plural} "{name}"' if name else plural
    text = f'{what} is forbidden: User "{user}" cannot {verb} resource "{plural}" in API group "{group}" {scope}'
    details: Json = {"name": name} if name else {}
    if group:
        details["group"] = group
    return failure(403, "Forbidden", text, {**details, "kind": plural})


def tooLarge(wanted: int, current: int, delay: float) -> StatusError:
    """A resourceVersion of the future: after a wait for it, 504."""
    text = f"Timeout: Too large resource version: {wanted}, current: {current}"
    causes = [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]
    body = status(504, "Timeout", text, {"causes": causes, "retryAfterSeconds": 1})
    return StatusError(504, body, {"Retry-After": "1"}, delay)


def tooOld(wanted: int, oldest: int) -> Json:
    """What the ERROR event of a watch from too long ago carries."""
    return status(410, "Expired", f"too old resource version: {wanted} ({oldest})")


def expiredExact() -> StatusError:
    return failure(410, "Expired", "The resourceVersion for the provided list is too old.")


def expiredContinue(token: str) -> StatusError:
    """:param token: what goes on inconsistently from there."""
    return failure(410, "Expired", EXPIRED_CONTINUE, metadata={"continue": token})


def invalidOptions(*problems: tuple[str, str]) -> StatusError:
    """422 about list options: pairs of field and problem."""
    texts = [f"{field}: Forbidden: {text}" for field, text in problems]
    joined = texts[0] if len(texts) == 1 else "[" + ", ".join(texts) + "]"
    causes = [{"reason": "FieldValueForbidden", "message": f"Forbidden: {text}", "field": field}
              for field, text in problems]  # fmt: skip
    details = {"group": "meta.k8s.io", "kind": "ListOptions", "causes": causes}
    return failure(422, "Invalid", f'ListOptions.meta.k8s.io "" is invalid: {joined}', details)


def deleted(kind: Kind, it: Json) -> Json:
    """What DELETE answers for most kinds."""
    details = {**_details(kind, it["metadata"]["name"]), "uid": it["metadata"].get("uid", "")}
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}


def _qualified(kind: Kind) -> str:
    return f"{kind.plural}.{kind.group}" if kind.group else kind.plural


def _details(kind: Kind, name: str) -> Json:
    details: Json = {"name": name}
    if kind.group:
        details["group"] = kind.group
    return {**details, "kind": kind.plural}
