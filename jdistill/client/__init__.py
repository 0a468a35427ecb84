"""TeacherClient: verified, aligned token log-probabilities from teacher sidecars. Needs numpy, protobuf, grpcio."""

from jdistill.client.alignment import BatchScores
from jdistill.client.teacher_client import TeacherClient
from jdistill.client.teachers import Teacher
from jdistill.wire.types import SequenceToScore, ServerInfo, TokenScores

__all__ = ["BatchScores", "SequenceToScore", "ServerInfo", "Teacher", "TeacherClient", "TokenScores"]
