"""What comes out of the log, and what does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO, StringIO, TextIOWrapper
from typing import Any

from twisted.internet.task import Clock
from twisted.logger import ILogObserver, LogEvent, Logger, LogLevel, LogPublisher, globalLogPublisher
from twisted.python import log
from twisted.python import log as legacyLog
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from twisted_kproxy import logs, redaction

TOKEN = "s3cret-t0ken\"with'quotes"


def failureOf(text: str) -> Failure:
    try:
        raise RuntimeError(text)
    except RuntimeError:
        return Failure()


class LogCase(SynchronousTestCase):
    """Each test has secrets of its own."""

    def setUp(self) -> None:
        self.patch(redaction, "_secrets", redaction._Secrets())
        self.patch(logs, "_threshold", [logs.LogLevel.debug])

    def written(self, factory: Callable[[Any], Any], say: Callable[[Logger], object]) -> str:
        """What an observer writes of what is said."""
        file = StringIO()
        publisher = LogPublisher(factory(file))
        say(Logger(namespace="kproxy.test", observer=publisher))
        return file.getvalue()

    def json(self, say: Callable[[Logger], object]) -> dict[str, Any]:
        text = self.written(logs.json, say)
        self.assertEqual(text.count("\n"), 1)
        loaded = json.loads(text)
        assert isinstance(loaded, dict)
        return loaded


class JsonTests(LogCase):
    """A JSON object per line."""

    def test_interface(self) -> None:
        """What the factories make are log observers, as twistd --logger wants them without arguments."""
        for factory in (logs.json, logs.journal, logs.text):
            verifyObject(ILogObserver, factory())

    def test_fields(self) -> None:
        """A line has time, level, namespace and the sentence, and every field that is a plain value."""
        line = self.json(
            lambda log: log.warn("{n} of {o} é\nx", n=3, o=object, text="a\nb", yes=True, none=None, part=0.5, list=[1])
        )
        time = line.pop("time")
        self.assertRegex(time, r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\Z")
        self.assertEqual(
            line,
            {
                "level": "warn",
                "namespace": "kproxy.test",
                "message": "3 of <class 'object'> é\nx",
                "n": 3,
                "text": "a\nb",
                "yes": True,
                "none": None,
                "part": 0.5,
            },
        )

    def test_time(self) -> None:
        """The time is that of the event, in UTC."""
        event: LogEvent = {"log_time": 86400.25, "log_level": LogLevel.info, "log_format": "x"}
        self.assertEqual(json.loads(logs.jsonLine(event))["time"], "1970-01-02T00:00:00.250000Z")

    def test_clashingNames(self) -> None:
        """A field that is called as one of the line's own keeps its value under another name."""
        line = json.loads(logs.jsonLine({"log_level": LogLevel.info, "log_format": "x", "level": 7, "time": "noon"}))
        self.assertEqual((line["level"], line["field_level"], line["field_time"]), ("info", 7, "noon"))

    def test_oddNumbers(self) -> None:
        """Numbers that JSON does not know are text."""
        line = self.json(lambda log: log.info("x", a=float("nan"), b=float("inf")))
        self.assertEqual((line["a"], line["b"]), ("nan", "inf"))

    def test_failure(self) -> None:
        """A failure is a traceback."""
        line = self.json(lambda log: log.failure("it broke", failureOf("badly")))
        self.assertEqual((line["level"], line["message"]), ("critical", "it broke"))
        self.assertIn("RuntimeError: badly", line["traceback"])

    def test_legacy(self) -> None:
        """What comes by Twisted's older log is a line like others."""
        file = StringIO()
        publisher = LogPublisher(logs.json(file))
        legacyLog.LogPublisher(observerPublisher=publisher, publishPublisher=publisher).msg("one", "two", port=8)
        line = json.loads(file.getvalue())
        self.assertEqual((line["message"], line["port"], "isError" in line), ("one two", 8, False))

    def test_unformattable(self) -> None:
        """An event that cannot be formatted costs neither the line nor the next one."""

        class Odd:
            def __str__(self) -> str:
                raise ValueError("no")

            __repr__ = __str__

        text = self.written(logs.json, lambda log: (log.info("{it}", it=Odd()), log.info("fine")))
        lines = [json.loads(line) for line in text.splitlines()]
        self.assertEqual(lines[-1]["message"], "fine")
        self.assertEqual(len(lines), 2)


class JournalTests(LogCase):
    """Lines with a priority, as sd-daemon(3) wants them."""

    def test_priorities(self) -> None:
        """Each level has its syslog priority."""
        text = self.written(
            logs.journal,
            lambda log: (log.debug("a"), log.info("b"), log.warn("c"), log.error("d"), log.critical("e")),
        )
        self.assertEqual(
            text.splitlines(),
            [f"<{n}>[kproxy.test] {letter}" for n, letter in ((7, "a"), (6, "b"), (4, "c"), (3, "d"), (2, "e"))],
        )

    def test_traceback(self) -> None:
        """Every line of a traceback has the priority."""
        lines = self.written(logs.journal, lambda log: log.failure("it broke", failureOf("badly"))).splitlines()
        self.assertGreater(len(lines), 3)
        self.assertTrue(all(line.startswith("<2>") for line in lines))

    def test_forgedLines(self) -> None:
        """A name with a line break or an escape sequence in it stays on its line and harmless."""
        text = self.written(logs.journal, lambda log: log.info("Service {name}", name="a\n<0>panic\x1b[2J"))
        self.assertEqual(text, "<6>[kproxy.test] Service a\\n<0>panic\\x1b[2J\n")

    def test_format(self) -> None:
        """The configuration may ask for JSON lines in the journal, and for text again."""
        self.addCleanup(logs.useJournalFormat, "text")
        logs.useJournalFormat("json")
        self.assertEqual(json.loads(self.written(logs.journal, lambda log: log.info("x")))["message"], "x")
        logs.useJournalFormat("text")
        self.assertTrue(self.written(logs.journal, lambda log: log.info("x")).startswith("<6>"))

    def test_narrowEncoding(self) -> None:
        """A name that the file's encoding cannot say is escaped, not lost."""
        raw = BytesIO()
        file = TextIOWrapper(raw, "ascii")
        logs.journal(file)({"log_format": "é", "log_level": LogLevel.info})
        self.assertEqual(raw.getvalue(), b"<6>[-] \\xe9\n")

    def test_closedFile(self) -> None:
        """A reader that has gone does not raise."""
        file = StringIO()
        observer = logs.journal(file)
        file.close()
        observer({"log_format": "x", "log_level": LogLevel.info})


class SecretTests(LogCase):
    """No secret comes out, in whichever form."""

    def everywhere(self, say: Callable[[Logger], object]) -> str:
        return "".join(self.written(factory, say) for factory in (logs.json, logs.journal, logs.text))

    def assertHidden(self, text: str, *secrets: str) -> None:
        for secret in secrets:
            for spelling in (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]):
                self.assertNotIn(spelling, text)
        self.assertIn(logs.MASK, text)

    def test_registered(self) -> None:
        """A registered value is hidden in sentences, fields and tracebacks, alone or within other text."""
        logs.hide(TOKEN)
        for say in (
            lambda log: log.info(f"got {TOKEN}!"),
            lambda log: log.info("got {it}", it=TOKEN),
            lambda log: log.info("got {it!r}", it=TOKEN, other=f"x{TOKEN}y"),
            lambda log: log.info("got {it}", it={"a": [TOKEN.encode()]}),
            lambda log: log.failure("broke", failureOf(f"with {TOKEN}")),
        ):
            self.assertHidden(self.everywhere(say), TOKEN)

    def test_spellings(self) -> None:
        """A secret is hidden in a URL, in base64 and without the line break of its file as well."""
        logs.hide("pa ss/word\n")
        text = self.everywhere(lambda log: log.info("{a} {b}", a="pa%20ss%2Fword%0A", b="pa ss/word"))
        self.assertHidden(text, "pa ss/word", "pa%20")
        logs.hide("user:password")
        self.assertHidden(self.everywhere(lambda log: log.info("{it}", it="dXNlcjpwYXNzd29yZA==")), "dXNlcjpw")

    def test_key(self) -> None:
        """Each line of a private key is hidden."""
        lines = ["MIIEvQIBADANBgkqhkiG9w0BAQEFAASC", "BKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj"]
        logs.hide("-----BEGIN PRIVATE KEY-----\n" + "\n".join(lines) + "\n-----END PRIVATE KEY-----\n")
        self.assertHidden(self.everywhere(lambda log: log.info("{it}", it=f"x {lines[1]} y")), lines[1])

    def test_headers(self) -> None:
        """What stands in an Authorization header is hidden though nobody registered it, as are bearer tokens."""
        for said in (
            "Authorization: Bearer abc.def-123",
            "sent Bearer abc.def-123 to it",
            "authorization=Basic abc.def-123",
            repr({b"Authorization": [b"Bearer abc.def-123"]}),
            repr({"Authorization": "Negotiate abc.def-123"}),
            "https://me:abc.def-123@host/path",
            "token eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJr.abc.def-123",
        ):
            text = self.everywhere(lambda log, said=said: log.info("{it}", it=said, field=said))
            self.assertHidden(text, "abc.def-123")

    def test_harmless(self) -> None:
        """Other text is left alone, and nothing at all is no secret."""
        logs.hide("")
        logs.hide("see")  # no true secret is as short
        logs.hide(" \n")
        for said in ("authorization failed for shop/web", "see https://host/path?x=a@b", "10 of 12 in 0.5s"):
            self.assertEqual(logs.redacted(said), said)

    def test_bounded(self) -> None:
        """Renewed tokens do not pile up; the newest stay hidden."""
        self.patch(redaction, "REMEMBERED", 3)
        for number in range(10):
            logs.hide(f"token-number-{number}")
        self.assertEqual(logs.redacted("token-number-9 token-number-7"), "*** ***")
        self.assertEqual(len(redaction._secrets._known), 3)


class LevelTests(LogCase):
    """From which level on something is written."""

    def test_levels(self) -> None:
        """What is below the level stays out, of every form."""
        logs.useLevel("warn")
        for factory in (logs.text, logs.json, logs.journal):
            text = self.written(factory, lambda log: (log.debug("a1"), log.info("b2"), log.warn("c3"), log.error("d4")))
            self.assertEqual([it in text for it in ("a1", "b2", "c3", "d4")], [False, False, True, True])

    def test_twistedsOwn(self) -> None:
        """Twisted's lines about each port and factory are for debugging; its errors are not."""
        file = StringIO()
        observer = logs.text(file)
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        logs.useLevel("info")
        log.msg("Port starting on 1")
        Logger("twisted.web.client._HTTP11ClientFactory", observer=observer).info("Starting factory")
        self.assertEqual(file.getvalue(), "")
        Logger("twisted.web.client._HTTP11ClientFactory", observer=observer).warn("Something")
        Logger("twisted.scripts._twistd_unix", observer=observer).info("Shut down")
        self.assertEqual(file.getvalue().count("\n"), 2)
        log.err(RuntimeError("broken"), "it broke")
        self.flushLoggedErrors(RuntimeError)
        logs.useLevel("debug")
        log.msg("Port starting on 2")
        text = file.getvalue()
        self.assertEqual(["broke" in text, "on 1" in text, "on 2" in text], [True, False, True])


class OnceTests(SynchronousTestCase):
    """Lines that would come again and again."""

    def test_due(self) -> None:
        """A key is due at once, then once in each period; others are not affected; what was silent is counted."""
        clock = Clock()
        once = logs.Once(clock, 60)
        self.assertEqual([once.due("a"), once.due("a"), once.due("b")], [True, False, True])
        clock.advance(59)
        self.assertFalse(once.due("a"))
        clock.advance(1)
        self.assertTrue(once.due("a"))
        self.assertEqual((once.suppressed("a"), once.suppressed("a"), once.suppressed("b")), (2, 0, 0))

    def test_bounded(self) -> None:
        """Ever new keys do not fill the memory."""
        once = logs.Once(Clock(), 60)
        for number in range(20_000):
            once.due(number)
        self.assertLessEqual(len(once._last), logs.Once._MOST)
