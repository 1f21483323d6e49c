"""The trunk's protocol: trunk.proto, its generated code (`make proto`), tensors as bytes, errors as statuses."""

PROTOCOL = 6
SERVICE = "splitlearn.v1.Trunk"
DIRECTORY = "splitlearn.v1.Directory"
# A message stays below 4 MiB, gRPC's default limit, which every client and proxy accepts. Longer prompts go in parts.
MAX_TENSOR_BYTES = 2 * 1024 * 1024
MAX_MESSAGE_BYTES = 3 * 1024 * 1024
# The most bytes of a message beside its tensor's data.
ENVELOPE_BYTES = 1024
# The most servers of a chain. The durations of each take 27 bytes of the envelope.
MAX_HOPS = 16
# How a server's status begins when another server of the chain was lost or failed: the next one, or the one before.
NEXT_SERVER = "the next server of the chain, "
SERVER_BEFORE = "the server before this one in the chain "
# The most bytes of padding in an answer, to measure bandwidth.
MAX_PADDING_BYTES = 1 << 20
# The most keys of kept blocks in a message, each of so many bytes.
MAX_PREFIX_KEYS, PREFIX_KEY_BYTES = 2048, 16
# A trunk server prints this on stdout, followed by host:port, when it is ready.
READY = "trunk server listening on "
# The metadata that carries a client's token.
TOKEN_HEADER = "authorization"
TOKEN_SCHEME = "Bearer "
