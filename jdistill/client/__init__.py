"""TeacherClient: batching, replicas, retries, hedging, verification, alignment; no jax, no torch."""

from jdistill.client.alignment import BatchScores
from jdistill.client.teacher_client import TeacherClient
from jdistill.client.teachers import Teacher
from jdistill.wire.types import SequenceToScore, ServerInfo, TokenScores

__all__ = ["BatchScores", "SequenceToScore", "ServerInfo", "Teacher", "TeacherClient", "TokenScores"]
