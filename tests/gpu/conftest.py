"""PYRLK_DRY_GPU=1: the same tests, small and in the interpreter, on a device that is not there."""

import pytest
from dry_device import DRY, install

if DRY:
    install()  # before the tests ask whether there is a device

    @pytest.fixture(scope="session", autouse=True)
    def interpreted():
        import interpreting

        with interpreting.patching_the_language_once(), pytest.MonkeyPatch.context() as patch:
            interpreting.make_tiles_small(patch)
            yield
