"""AWS as the rest of Weft sees it: one session, clients that live as long as the process, and faults of six kinds.

Promise: a client of each service is opened once and closed with the `Aws`; every call has a bound on its attempts and
on its time; whatever goes wrong is an `AwsFault` that names the action, the resource and the kind, and says whether the
call may have been carried out all the same. botocore's own retries are off: what is repeated is repeated here, or by
who calls with `attempts=1` because it has to look first. Credentials come from where AWS's tools take them. Left to
others: what a call means (`infra.objects`, `infra.queues`, `origin.store`), and whether it may be repeated at all.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

import msgspec

from infra.clock import SYSTEM_CLOCK, Clock
from infra.retry import RetryEvent, retrying
from infra.settings import StoreSettings

T = TypeVar("T")

Kind = Literal["throttled", "unavailable", "denied", "missing", "invalid", "conflict"]
"""throttled: too much at once, not carried out. unavailable: no answer, or a 5xx. denied: credentials or permissions.
missing: the table, bucket, object, queue or key is not there. conflict: a condition did not hold, or another call was
in the way. invalid: AWS does not take the call as it is, and never will."""

AGAIN: Final[frozenset[Kind]] = frozenset({"throttled", "unavailable"})
"""What may pass by itself."""

_CODES: Final[Mapping[Kind, frozenset[str]]] = {
    "throttled": frozenset({
        "BandwidthLimitExceeded", "KMS.ThrottlingException", "KmsThrottled", "LimitExceededException", "OverLimit",
        "PriorRequestNotComplete", "ProvisionedThroughputExceededException", "RequestLimitExceeded",
        "RequestThrottled", "RequestThrottledException", "SlowDown", "Throttling", "ThrottlingError",
        "ThrottlingException", "ThrottledException", "TooManyRequestsException",
    }),
    "unavailable": frozenset({
        "InternalError", "InternalFailure", "InternalServerError", "RequestTimeout", "RequestTimeoutException",
        "ServiceUnavailable", "ServiceUnavailableException",
    }),
    "denied": frozenset({
        "AccessDenied", "AccessDeniedException", "AccountProblem", "AllAccessDisabled", "AuthFailure",
        "AuthorizationError", "DisabledException", "ExpiredToken", "ExpiredTokenException",
        "IncompleteSignature", "InvalidAccessKeyId", "InvalidClientTokenId", "InvalidSecurity",
        "InvalidSignatureException", "InvalidToken", "KMSInvalidStateException", "KMS.DisabledException",
        "KMS.AccessDeniedException", "KMS.KMSInvalidStateException", "KmsAccessDenied", "KmsDisabled",
        "KmsInvalidState", "MissingAuthenticationToken", "MissingAuthenticationTokenException",
        "MissingSecurityHeader", "NotAuthorized",
        "NotSignedUp", "OptInRequired", "RequestExpired", "RequestTimeTooSkewed", "SignatureDoesNotMatch",
        "UnauthorizedOperation", "UnrecognizedClientException",
    }),
    "missing": frozenset({
        "404", "AWS.SimpleQueueService.NonExistentQueue", "KMS.NotFoundException", "KmsNotFound", "NoSuchBucket",
        "NoSuchKey", "NotFound", "NotFoundException", "QueueDoesNotExist", "ResourceNotFoundException",
        "TableNotFoundException",
    }),
    "conflict": frozenset({
        "ConditionalCheckFailedException", "ConditionalRequestConflict", "IdempotentParameterMismatchException",
        "PreconditionFailed", "ReplicatedWriteConflictException", "TransactionCanceledException",
        "TransactionConflictException", "TransactionInProgressException",
    }),
}  # fmt: skip
_KINDS: Final[Mapping[str, Kind]] = {code: kind for kind, codes in _CODES.items() for code in codes}
_STATUSES: Final[Mapping[int, Kind]] = {401: "denied", 403: "denied", 404: "missing", 429: "throttled"}
"""Of answers whose code is none of these."""
_DENIED_ERRORS: Final = frozenset({
    "CredentialRetrievalError", "NoAuthTokenError", "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound",
    "SSOTokenLoadError", "TokenRetrievalError", "UnauthorizedSSOTokenError", "UnknownCredentialError",
})  # fmt: skip
_NETWORK_ERRORS: Final = frozenset({
    "ChecksumError", "ConnectTimeoutError", "ConnectionClosedError", "EndpointConnectionError", "FlexibleChecksumError",
    "HTTPClientError", "IncompleteReadError", "ProxyConnectionError", "ReadTimeoutError", "ResponseParserError",
    "ResponseStreamingError", "SSLError",
})  # fmt: skip
_UNSENT: Final = ("ClientConnectorError", "ConnectTimeoutError", "ProxyConnectionError", "NewConnectionError")
"""The request never left. (aiobotocore calls a reset in the middle of a request an EndpointConnectionError too.)"""


class AwsFault(Exception):
    """A call to AWS that failed."""

    def __init__(
        self,
        kind: Kind,
        action: str,
        resource: str,
        code: str,
        detail: str,
        *,
        unknown: bool = False,
        retry_after: float = 0.0,
        reasons: tuple[Mapping[str, Any] | None, ...] = (),
    ) -> None:
        super().__init__(f"{action} on {resource}: {code}: {detail}" if detail else f"{action} on {resource}: {code}")
        self.kind: Final[Kind] = kind
        self.action: Final = action
        """`dynamodb:PutItem`, as in a policy."""
        self.resource: Final = resource
        self.code: Final = code
        """AWS's own name for it, or the client library's."""
        self.detail: Final = detail
        self.unknown: Final = unknown
        """The call may have been carried out."""
        self.retry_after: Final = retry_after
        """Seconds, when the answer named some."""
        self.reasons: Final = reasons
        """Of a cancelled transaction: for each item why (`Code`, `Message`, `Item`), None where it was no reason."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (
            self.kind, self.action, self.resource, self.code, self.detail, self.unknown, self.retry_after, self.reasons
        )  # fmt: skip


def _rebuilt(
    kind: Kind, action: str, resource: str, code: str, detail: str, unknown: bool, retry_after: float, reasons: Any
) -> AwsFault:
    return AwsFault(
        kind, action, resource, code, detail, unknown=unknown, retry_after=retry_after, reasons=reasons
    )  # fmt: skip


def fault_of(error: Exception, action: str, resource: str) -> AwsFault | None:
    """What `error` is among AWS's faults; None when it is none of theirs (a mistake in our own code)."""
    if isinstance(error, AwsFault):
        return error
    response: object = getattr(error, "response", None)
    if isinstance(response, Mapping) and "Error" in response:
        return _answered(response, action, resource)
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _DENIED_ERRORS:
        return AwsFault("denied", action, resource, type(error).__name__, str(error))
    if isinstance(error, OSError | TimeoutError | asyncio.IncompleteReadError) or names & _NETWORK_ERRORS:
        inner: object = getattr(error, "kwargs", {}).get("error")
        seen = names | {kind.__name__ for kind in type(inner).__mro__}
        detail = " ".join(str(inner or error).split())
        return AwsFault(
            "unavailable", action, resource, type(error).__name__, detail, unknown=seen.isdisjoint(_UNSENT)
        )  # fmt: skip
    if "BotoCoreError" in names:
        return AwsFault("invalid", action, resource, type(error).__name__, " ".join(str(error).split()))
    return None


def _answered(response: Mapping[str, Any], action: str, resource: str) -> AwsFault:
    error: Mapping[str, Any] = response["Error"]
    meta: Mapping[str, Any] = response.get("ResponseMetadata", {})
    # Services that speak JSON may prefix a code with its namespace.
    code, detail = str(error.get("Code", "Unknown")).rpartition("#")[2], str(error.get("Message", ""))
    status = int(meta.get("HTTPStatusCode", 0) or 0)
    reasons = tuple(None if it.get("Code") in (None, "None") else it for it in response.get("CancellationReasons", ()))
    kind: Kind | None = _KINDS.get(code)
    if kind is None:
        kind = "unavailable" if status >= 500 else _STATUSES.get(status, "invalid")
    elif code == "TransactionCanceledException":
        kind = _kind_of_cancellation(reasons)
    try:
        retry_after = max(0.0, float(meta.get("HTTPHeaders", {}).get("retry-after", 0)))
    except ValueError:
        retry_after = 0.0
    return AwsFault(
        kind, action, resource, code, detail, unknown=kind == "unavailable", retry_after=retry_after, reasons=reasons
    )  # fmt: skip


def _kind_of_cancellation(reasons: tuple[Mapping[str, Any] | None, ...]) -> Kind:
    """A cancelled transaction is a conflict, unless nothing stood in its way but the rate, or it can't be at all."""
    codes = {str(it["Code"]) for it in reasons if it is not None}
    if codes & {"ValidationError", "ItemCollectionSizeLimitExceeded"}:
        return "invalid"
    if codes and codes <= {"ThrottlingError", "ProvisionedThroughputExceeded"}:
        return "throttled"
    return "conflict"


class AwsOptions(msgspec.Struct, frozen=True):
    """Where AWS is, and how long and how often it is asked."""

    region: str = ""
    """Empty: from AWS_REGION or the profile, as AWS's tools do."""
    endpoint_url: str = ""
    """Another address than AWS's own, for all services."""
    connect_s: float = 2.0
    read_s: float = 10.0
    """Between two pieces of an answer."""
    call_s: float = 20.0
    """One call with all its attempts, and its wait for a connection."""
    attempts: int = 4
    connections_max: int = 64
    """Of each service."""

    @classmethod
    def of(cls, store: StoreSettings) -> AwsOptions:
        return cls(
            region=store.aws_region,
            endpoint_url=store.endpoint_url,
            connect_s=store.aws_connect_s,
            read_s=store.aws_read_s,
            call_s=store.aws_call_s,
            attempts=store.aws_attempts,
            connections_max=store.aws_connections_max,
        )

    def client_arguments(self) -> dict[str, Any]:
        """What clients of any service are made with, aiobotocore's and boto3's alike (they differ in `config`)."""
        return {"endpoint_url": self.endpoint_url or None}

    def config_arguments(self) -> dict[str, Any]:
        return {
            "connect_timeout": self.connect_s,
            "read_timeout": self.read_s,
            "max_pool_connections": self.connections_max,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "user_agent_extra": "weft",
            # Names under an address of one's own (`bucket.127.0.0.1`) do not resolve.
            "s3": {"addressing_style": "path" if self.endpoint_url else "auto"},
        }


class Aws:
    """One session of a process. `async with Aws(options) as aws`; clients are shared by all who ask."""

    def __init__(self, options: AwsOptions, *, clock: Clock = SYSTEM_CLOCK, rng: random.Random | None = None) -> None:
        self.options: Final = options
        self._clock = clock
        self._rng = rng if rng is not None else random.SystemRandom()
        self._stack = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._clients: dict[str, Any] = {}
        self._session: Any = None
        self._calls = self._retries = 0

    async def __aenter__(self) -> Aws:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every client, the last opened first."""
        self._clients.clear()
        await self._stack.aclose()

    @asynccontextmanager
    async def client(self, service: str) -> AsyncGenerator[Any]:
        """The process' own aiobotocore client of `service`; it stays open behind the block."""
        yield self._clients.get(service) or await self._open(service)

    async def _open(self, service: str) -> Any:
        async with self._opening:
            if service not in self._clients:
                # Imported where they are needed: a region on SQLite has nothing to do with them.
                import aioboto3
                from aiobotocore.config import AioConfig

                if self._session is None:
                    self._session = aioboto3.Session(region_name=self.options.region or None)
                opened = self._session.client(
                    service, config=AioConfig(**self.options.config_arguments()), **self.options.client_arguments()
                )
                self._clients[service] = await self._stack.enter_async_context(opened)
            return self._clients[service]

    async def call(
        self, service: str, operation: str, *, resource: str, attempts: int | None = None, **parameters: Any
    ) -> dict[str, Any]:
        """Carry out one operation by its name in a policy (`PutItem`) and return its answer, or raise AwsFault.

        Repeated when throttled or unavailable, so it must be harmless to repeat, or say `attempts=1`.
        """
        method = _METHODS.get(operation) or _METHODS.setdefault(operation, _snake(operation))

        async def once(client: Any) -> dict[str, Any]:
            return await getattr(client, method)(**parameters)

        return await self.run(service, operation, once, resource=resource, attempts=attempts)

    async def run(
        self,
        service: str,
        operation: str,
        work: Callable[[Any], Awaitable[T]],
        *,
        resource: str,
        attempts: int | None = None,
    ) -> T:
        """The same for what is more than one call of the client: `work` gets it, reads what streams, and may be
        begun again."""
        action = f"{service}:{operation}"
        unknown = False

        async def attempt() -> T:
            nonlocal unknown
            self._calls += 1
            try:
                async with self.client(service) as client:
                    return await work(client)
            except Exception as error:
                fault = fault_of(error, action, resource)
                if fault is None or fault is error:
                    raise
                unknown = unknown or fault.unknown
                raise fault from error

        try:
            async with asyncio.timeout(self.options.call_s):
                return await retrying(
                    attempt,
                    on=_passes,
                    attempts=self.options.attempts if attempts is None else attempts,
                    seconds_max=self.options.call_s,
                    rng=self._rng,
                    clock=self._clock,
                    on_retry=self._note,
                )
        except TimeoutError:
            detail = f"no answer in {self.options.call_s:g} s"
            raise AwsFault("unavailable", action, resource, "Timeout", detail, unknown=True) from None
        except AwsFault as fault:
            if unknown and not fault.unknown:
                # An attempt before may have been carried out, whatever the last one says.
                raise AwsFault(
                    fault.kind, action, resource, fault.code, fault.detail,
                    unknown=True, retry_after=fault.retry_after, reasons=fault.reasons,
                ) from fault  # fmt: skip
            raise

    def _note(self, event: RetryEvent) -> None:
        self._retries += 1

    def statistics(self) -> AwsStatistics:
        return AwsStatistics(self._calls, self._retries, tuple(self._clients))

    def __repr__(self) -> str:
        return f"<Aws {self.options.region or 'default region'} {', '.join(self._clients) or 'no clients yet'}>"


class AwsStatistics(msgspec.Struct, frozen=True):
    calls: int
    """Attempts included."""
    retries: int
    clients: tuple[str, ...]


_METHODS: Final[dict[str, str]] = {}
"""Client methods by operation; there are as many as the product's code has names."""


def _snake(operation: str) -> str:
    from botocore import xform_name

    return str(xform_name(operation))


def _passes(error: Exception) -> bool:
    return isinstance(error, AwsFault) and error.kind in AGAIN
