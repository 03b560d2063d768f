"""What the words of an object store's errors mean, and the sentence that a person gets instead of them.

pyarrow gives every fault of a store as an OSError with the SDK's text; the marks below are parts of those texts.
"""

MISSING = ("NO_SUCH_KEY", "RESOURCE_NOT_FOUND", "HTTP response code 404", "Path does not exist", "No such directory")
NO_BUCKET = ("NO_SUCH_BUCKET", "NoSuchBucket", "InvalidBucketName", "Bucket not found")
REFUSED = (
    *("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_SIGNATURE", "EXPIRED_TOKEN"),
    *("MISSING_AUTHENTICATION_TOKEN", "ExpiredToken", "UNRECOGNIZED_CLIENT", "Access Denied", "credentials"),
    *("HTTP response code 401", "HTTP response code 403"),
    *("Status(PERMISSION_DENIED", "Status(UNAUTHENTICATED", "Could not create a OAuth2 access token"),  # Google's
)
UNREACHABLE = (
    *("NETWORK_CONNECTION", "curlCode", "Could not connect", "Couldn't connect", "Couldn't resolve"),
    "CURL error",  # Google's
)
TRANSIENT = (
    *UNREACHABLE,
    *("SLOW_DOWN", "SlowDown", "THROTTLING", "REQUEST_TIMEOUT", "INTERNAL_FAILURE", "SERVICE_UNAVAILABLE"),
    *("HTTP response code 408", "HTTP response code 429", "HTTP response code 5", "HTTP status 5", "Incomplete write"),
    "NO_SUCH_UPLOAD",  # the store took the parts, its answer was lost, and the client asked again: upload anew
    *("Status(UNAVAILABLE", "Status(RESOURCE_EXHAUSTED", "Status(DEADLINE_EXCEEDED", "Status(INTERNAL"),  # Google's
)
LOST_UPLOADS = ("retry.function=UploadChunk", "retry.function=QueryResumableUpload")
"""In the text of Google's client, where what was not found is an upload under way: it is to be begun anew."""
GOOGLE = "google::cloud::Status("
"""How the text of every fault of Google's store begins; pyarrow gives some as an ArrowException that is no OSError."""
NO_TRAILERS = "MissingContentLength"

_ACCESS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account",
}
_ENDPOINT = {"s3": "AWS_ENDPOINT_URL", "gs": "CLOUD_STORAGE_EMULATOR_ENDPOINT"}


def shown(uri: str) -> str:
    """`uri` as it may be printed: without user name, password and query."""
    if "://" not in uri:
        return uri
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{rest.split('?', 1)[0].rsplit('@', 1)[-1]}"


def mentions(text: str, marks: tuple[str, ...]) -> bool:
    return any(mark in text for mark in marks)


def advice(uri: str, text: str) -> str:
    """One sentence for a person; the store's own words are left out where they may hold a key id."""
    scheme = "gs" if uri.startswith("gs:") else "s3"
    endpoint = _ENDPOINT[scheme]
    if mentions(text, NO_BUCKET):
        return f"{shown(uri)}: the bucket does not exist; make it, or check the name and the endpoint ({endpoint})"
    if mentions(text, REFUSED):
        return (
            f"{shown(uri)}: access was refused; check the credentials in the environment ({_ACCESS[scheme]}) "
            "and their rights on the bucket"
        )
    if mentions(text, UNREACHABLE):
        return f"{shown(uri)}: the object store does not answer; start it, or check {endpoint} and the network"
    if NO_TRAILERS in text:
        return (
            f"{shown(uri)}: the server does not understand checksums in trailers; "
            "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
        )
    return f"{shown(uri)}: the object store failed ({' '.join(text.split())[:200]}); try again, or check the store"
