"""Types, numpy <-> protobuf, errors <-> status codes, validation; needs numpy, protobuf and grpcio."""
