"""A page in the browser, and everything that went wrong in it."""

from typing import Any


class Opened:
    """A page in the browser, and everything that went wrong in it."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.page = browser.new_context(**options).new_page()
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.wrong.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("dialog", lambda d: (self.wrong.append(f"dialog {d.message}"), d.dismiss()))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.goto(url)

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def tip(self) -> str:
        tip = self.page.locator("#tip")
        return tip.inner_text() if tip.is_visible() else ""
