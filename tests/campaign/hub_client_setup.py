"""What a forked command does before it starts, so that it talks to the campaign's Hub from a cache of its own."""

import os
import time
from pathlib import Path

import datasets
import huggingface_hub
from hub_server import go_online
from huggingface_hub import file_download

SILENCE = 1.0  # seconds after which a server counts as gone
_LONGEST_SLEEP = 0.01


def talk_to(url: str, home: str, token: str | None) -> None:
    """Point the Hub's client of this process to a server, a cache and a token; None: what `hf auth login` left.

    Between its attempts it does not wait; how long it would have is added to `home`/waited.
    """
    os.environ["HF_HUB_DOWNLOAD_TIMEOUT"] = str(SILENCE)
    constants = huggingface_hub.constants
    go_online(url, token)
    constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH = f"{home}/hub", f"{home}/token"
    constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = SILENCE
    file_download._ETAG_RETRY_TIMEOUT = SILENCE  # a minute, for the second time that a file is looked for
    datasets.config.HF_DATASETS_CACHE = Path(home, "datasets")
    sleep = time.sleep

    def wait(seconds: float) -> None:
        if seconds > _LONGEST_SLEEP:
            with Path(home, "waited").open("a") as file:
                file.write(f"{seconds}\n")
        sleep(min(seconds, _LONGEST_SLEEP))

    time.sleep = wait
