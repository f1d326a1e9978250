"""A follower that computes nothing: it answers with all messages so far from the second on."""

import os
import sys
import time

from service.parallel.followers import Inbox

if __name__ == "__main__":
    inbox, rank = Inbox(int(sys.argv[1])), int(sys.argv[2])
    messages: list[object] = []
    while (message := inbox.take()) is not None:
        messages.append(message)
        if message == "die":
            os._exit(3)
        if message == "sleep":
            time.sleep(60)
        if message in {"second", "hello"}:
            inbox.answer((rank, messages))
