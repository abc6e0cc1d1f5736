"""The page may run its own script, and no other."""

from __future__ import annotations

import base64
import hashlib
import re

from lorac.serving.app import PAGE


def test_the_policy_names_the_script() -> None:
    page = PAGE.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script[^>]*>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page, "write this hash into the page's policy"
    assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|Storage|cookie", page)
