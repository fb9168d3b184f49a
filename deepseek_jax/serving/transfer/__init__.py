"""Prefill and decode apart (report section 3.4): one server computes prompts, another draws the answers.

The decode server leads. Its engine gives a request a slot and pages, as ever, finds what its own prefix cache has, and asks
a prefill server for the rest over a connection of the request's own (`decode.py: Fetching`). That server (`prefill.py:
PrefillServer`) queues the prompt in its engine and computes all but its last token, and sends pages of latents as they become
whole, while the next chunk is computed. The decode engine writes them into its own pages, then computes the last token as a
chunk of one and draws. So neither the first token nor the state of sampling, of a grammar or of the MTP module travels: they
follow from the request and the latents. Log-probabilities of the prompt travel where they are asked for.

A decode server:

    thread = EngineThread(engine)
    weights = fingerprint(model.params)                           # `identity.py`; of several processes, on all
    fetching = Fetching(thread, weights, prefills, alone=role == "both")  # from now on prompts are fetched
    ...
    fetching.close()                                              # before thread.close()

`prefills` (`decode.py: Prefills`) says which server computes the prompt of a request. `Asked()` takes the request's own word,
`Request.prefill`, as "host:port": what a router puts into a header. With `alone`, prompts for which there is no server, or
whose server fails, are computed here; without it such a request ends: `Update.finish_reason` is "error", `Update.error` one
line that says which server failed in which state, and `Update.code` the class of it, by which a router sends it again
(`errors.py`). All codes begin with "prefill_". HTTP answers carry the code with status 503.

A prefill server:

    server = PrefillServer(EngineThread(engine), weights, "0.0.0.0", 9000)  # port 0: any that is free
    server.address                                                # (host, port) to which it is bound
    server.drain()                                                # refuses what comes from now on: "prefill_refused"
    server.requests                                               # how many it has, queued or being computed or sent
    server.close()                                                # ends those; before thread.close()

Both need engines of the same model, weights and cache (`identity.py`): they compare these when they meet. What travelled, how
fast and what failed: `engine.traffic` (`traffic.py`); each request has a line in the log, "deepseek_jax.serving.transfer".
"""
