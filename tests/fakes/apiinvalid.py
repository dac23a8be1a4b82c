"""Faults in objects, collected and worded as the API server does: 422 with causes."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable
from typing import Any

from .apikinds import Json, Kind
from .apistatus import StatusError, failure

IP = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
PORT = "must be between 1 and 65535, inclusive"
IMMUTABLE = "field is immutable"
_LABEL_TEXT = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    "an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
_SUBDOMAIN_TEXT = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_VALUE_TEXT = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")


class Problems:
    """The faults of one object. False as long as there are none."""

    def __init__(self) -> None:
        self.causes: list[Json] = []

    def __bool__(self) -> bool:
        return bool(self.causes)

    def _add(self, reason: str, field: str, message: str) -> None:
        self.causes.append({"reason": f"FieldValue{reason}", "message": message, "field": field})

    def invalid(self, field: str, value: Any, text: str) -> None:
        self._add("Invalid", field, f"Invalid value: {_shown(value)}: {text}")

    def required(self, field: str, text: str = "") -> None:
        self._add("Required", field, "Required value" + (f": {text}" if text else ""))

    def forbidden(self, field: str, text: str) -> None:
        self._add("Forbidden", field, f"Forbidden: {text}")

    def duplicate(self, field: str, value: Any) -> None:
        self._add("Duplicate", field, f"Duplicate value: {_shown(value)}")

    def tooMany(self, field: str, count: int, most: int) -> None:
        self._add("TooMany", field, f"Too many: {count}: must have at most {most} items")

    def oneOf(self, field: str, value: Any, supported: Iterable[str]) -> None:
        """Unless it is one of those."""
        if value not in (known := list(supported)):
            text = ", ".join(_shown(it) for it in sorted(known))
            self._add("NotSupported", field, f"Unsupported value: {_shown(value)}: supported values: {text}")

    def same(self, field: str, old: Any, new: Any, text: str = IMMUTABLE) -> None:
        """Unless nothing has changed."""
        if old != new:
            self.invalid(field, new, text)

    def label(self, field: str, value: Any) -> None:
        """Unless it is a DNS label."""
        if not isinstance(value, str) or not _LABEL.fullmatch(value):
            self.invalid(field, value, _LABEL_TEXT)
        elif len(value) > 63:
            self.invalid(field, value, "must be no more than 63 characters")

    def subdomain(self, field: str, value: Any) -> None:
        """Unless it is a DNS name."""
        if not isinstance(value, str) or not _SUBDOMAIN.fullmatch(value):
            self.invalid(field, value, _SUBDOMAIN_TEXT)
        elif len(value) > 253:
            self.invalid(field, value, "must be no more than 253 characters")

    def labels(self, field: str, labels: Json) -> None:
        for value in labels.values():
            if not _VALUE.fullmatch(value):
                self.invalid(field, value, _VALUE_TEXT)
            elif len(value) > 63:
                self.invalid(field, value, "must be no more than 63 characters")

    def port(self, field: str, value: Any) -> None:
        if not isinstance(value, int) or not 1 <= value <= 65535:
            self.invalid(field, value, PORT)

    def ip(self, field: str, value: str, family: str = "", special: bool = False) -> None:
        """
        Unless it is an IP address of that family.

        :param special: whether it may be a loopback, link-local or multicast address, or none at all.
        """
        found = familyOf(value)
        if not found:
            self.invalid(field, value, f"must be a valid {family} address" if family else IP)
        elif family and found != family:
            self.invalid(field, value, f"must be an {family} address")
        elif not special:
            address = ipaddress.ip_address(value)
            for is_, text in (
                (address.is_unspecified, f"may not be unspecified ({value})"),
                (address.is_loopback, "may not be in the loopback range (127.0.0.0/8, ::1/128)"),
                (address.is_link_local, "may not be in the link-local range (169.254.0.0/16, fe80::/10)"),
                (address.is_multicast, "may not be in the multicast range (224.0.0.0/4, ff00::/10)"),
            ):
                if is_:
                    self.invalid(field, value, text)

    def end(self, kind: Kind, name: str) -> None:
        """:raise StatusError: 422 if there are any."""
        if self.causes:
            raise invalid(kind, name, self.causes)


def invalid(kind: Kind, name: str, causes: list[Json]) -> StatusError:
    texts = [f"{cause['field']}: {cause['message']}" for cause in causes]
    said = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    what = f"{kind.kind}.{kind.group}" if kind.group else kind.kind
    details: Json = {"name": name, **({"group": kind.group} if kind.group else {}), "kind": kind.kind}
    return failure(422, "Invalid", f'{what} "{name}" is invalid: {said}', {**details, "causes": causes})


def familyOf(value: Any) -> str:
    """``IPv4``, ``IPv6``, or ``""`` for what is no IP address."""
    try:
        return f"IPv{ipaddress.ip_address(value).version}" if isinstance(value, str) else ""
    except ValueError:
        return ""


def _shown(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
