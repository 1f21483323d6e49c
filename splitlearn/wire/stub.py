"""The methods of the services of trunk and directory: the one place that has their names, for clients and servers."""

import grpc

from splitlearn.wire import DIRECTORY, SERVICE, directory_pb2
from splitlearn.wire import trunk_pb2 as pb

DESCRIBE = f"/{SERVICE}/Describe"
SESSION = f"/{SERVICE}/Session"
DROP = f"/{SERVICE}/Drop"
METRICS = f"/{SERVICE}/Metrics"
LIST = f"/{DIRECTORY}/List"


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


class DirectoryStub:
    """What a client of the directory calls over `channel`."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.list: grpc.UnaryUnaryMultiCallable[directory_pb2.ListRequest, directory_pb2.Listing] = channel.unary_unary(
            LIST,
            request_serializer=directory_pb2.ListRequest.SerializeToString,
            response_deserializer=directory_pb2.Listing.FromString,
        )
