"""What crosses the wire: types, numpy <-> protobuf, errors <-> status codes. Needs numpy, protobuf and grpcio only."""
