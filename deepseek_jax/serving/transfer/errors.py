"""What can go wrong between a decode and a prefill server. `code` goes to the client with the answer, and says a router that
the request may be sent again, to other servers."""


class TransferError(Exception):
    """The prompt of a request did not come. The message says which server, in which state, and what happened."""

    code = "prefill_failed"


class NoPrefillError(TransferError):
    """No prefill server is known."""

    code = "prefill_missing"


class PrefillLostError(TransferError):
    """The connection could not be made, ended, or was silent; or a deadline passed."""

    code = "prefill_lost"


class PrefillRefusedError(TransferError):
    """The server does not take the request, or could not compute it: it is full, or it is about to end."""

    code = "prefill_refused"


class PrefillDiffersError(TransferError):
    """The server has other weights, or another cache."""

    code = "prefill_differs"


class NotWantedError(TransferError):
    """The decode server ended the request."""

    code = "cancelled"


KINDS: dict[str, type[TransferError]] = {
    kind.code: kind
    for kind in (TransferError, NoPrefillError, PrefillLostError, PrefillRefusedError, PrefillDiffersError)
}
