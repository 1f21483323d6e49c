"""What a trunk server can read of its clients' text: attacks on what crosses the wire, run on one's own prompts.

    with Relay(address) as relay: ...                    # relay.py: records the bytes between a client and its trunk
    capture = relay.sessions[0].capture()                # capture.py: what the trunk of that session had
    recovered = ATTACKS["search"].run(capture, Checkpoint.of(capture, files))  # registry.py, checkpoint.py

An attack gets a capture and the public checkpoint, and nothing else; the prompt is known to the scorer alone
(scores.py). `sweep.py` does this for many prompts, cuts and defences. docs/privacy.md says what it means.
"""
