"""How many examples tests of properties try: few, or as many as CALIBTIP_TEST_EXAMPLES in the environment says."""

import os

from hypothesis import settings


def examples(count: int) -> settings:
    return settings(max_examples=int(os.environ.get("CALIBTIP_TEST_EXAMPLES", count)), deadline=None, derandomize=True)
