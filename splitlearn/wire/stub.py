"""The methods of the trunk's service: the one place that has their names, for clients and servers."""

import grpc

from splitlearn.wire import SERVICE
from splitlearn.wire import trunk_pb2 as pb

DESCRIBE = f"/{SERVICE}/Describe"
SESSION = f"/{SERVICE}/Session"
DROP = f"/{SERVICE}/Drop"
METRICS = f"/{SERVICE}/Metrics"


class TrunkStub:
    """What a client calls over `channel`. Sessions and drops take and give serialized messages: they are on the hot
    path, or are proxied unread."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.session: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(SESSION)
        self.drop: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(DROP)
        self.describe: grpc.UnaryUnaryMultiCallable[pb.DescribeRequest, pb.Description] = channel.unary_unary(
            DESCRIBE,
            request_serializer=pb.DescribeRequest.SerializeToString,
            response_deserializer=pb.Description.FromString,
        )
        self.metrics: grpc.UnaryUnaryMultiCallable[pb.MetricsRequest, pb.MetricsText] = channel.unary_unary(
            METRICS,
            request_serializer=pb.MetricsRequest.SerializeToString,
            response_deserializer=pb.MetricsText.FromString,
        )
