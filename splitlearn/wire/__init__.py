"""The trunk's protocol: trunk.proto, the code generated from it (`make proto`), tensors as bytes, errors as statuses."""

PROTOCOL = 1
# One message: below gRPC's default limit of 4 MiB, so that any client or proxy passes it. More goes in parts.
MAX_TENSOR_BYTES = 2 * 1024 * 1024
MAX_MESSAGE_BYTES = 3 * 1024 * 1024
