"""A schema with one message per token, like vLLM's own gRPC schema, built without a compiler."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FIELD = descriptor_pb2.FieldDescriptorProto


def _reply_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="per_token.proto", package="benchmark", syntax="proto3")
    fields = {
        "Token": [("logprob", _FIELD.TYPE_FLOAT, ""), ("top_ids", _FIELD.TYPE_UINT32, "*")],
        "Sequence": [("tokens", _FIELD.TYPE_MESSAGE, ".benchmark.Token")],
        "Reply": [("sequences", _FIELD.TYPE_MESSAGE, ".benchmark.Sequence")],
    }
    fields["Token"].append(("top_logprobs", _FIELD.TYPE_FLOAT, "*"))
    for name, columns in fields.items():
        message = file.message_type.add(name=name)
        for number, (field, kind, what) in enumerate(columns, 1):
            label = _FIELD.LABEL_REPEATED if what else _FIELD.LABEL_OPTIONAL
            message.field.add(
                name=field, number=number, type=kind, label=label, type_name=what if what.startswith(".") else None
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("benchmark.Reply"))


PerTokenReply = _reply_class()
