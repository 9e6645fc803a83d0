"""Find the credentials, the region and the address of S3 where AWS's standards put them.

botocore reads them: environment, ~/.aws, single sign-on, roles that are assumed, web identities,
and the roles of containers and machines.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from botocore import exceptions as boto
from botocore.configprovider import ConfiguredEndpointProvider
from botocore.session import Session

from s4g_ray.storage.s3_settings import is_anonymous

# botocore renews credentials 10 to 15 minutes before they expire, and obstore asks for them
# 5 minutes before the time that it is told
CREDENTIALS_KEPT = timedelta(minutes=10)


@dataclass(frozen=True)
class S3Access:
    """Where S3 is, and who asks."""

    session: Session
    credentials: Any  # of botocore; None for requests that are not signed
    region: str | None
    endpoint: str | None  # of a store other than AWS
    ca_bundle: bytes | None  # certificates in PEM

    @classmethod
    def find(cls) -> S3Access:
        """Read the environment and the files of ~/.aws.

        Raises BotoCoreError for a profile or a file that is wrong, and where there are no
        credentials.
        """
        session = Session()
        profile = session.get_scoped_config()
        endpoint = None
        if not session.get_config_variable("ignore_configured_endpoint_urls"):
            endpoint = ConfiguredEndpointProvider(session.full_config, profile, "s3").provide()
        ca_bundle = session.get_config_variable("ca_bundle")
        credentials = None
        if not is_anonymous("s3"):
            credentials = session.get_credentials()
            if credentials is None:
                raise boto.NoCredentialsError
        return cls(
            session,
            credentials,
            session.get_config_variable("region") or os.environ.get("AWS_REGION"),
            endpoint,
            Path(ca_bundle).read_bytes() if ca_bundle else None,
        )

    def current_credentials(self) -> dict[str, Any]:
        """Return the credentials as obstore's S3CredentialProvider does; renew them when needed."""
        frozen = self.credentials.get_frozen_credentials()
        is_temporary = hasattr(self.credentials, "refresh_needed")
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + CREDENTIALS_KEPT if is_temporary else None,
        }

    def find_region(self, bucket: str) -> str | None:
        """Ask the store for the region of a bucket; None when it does not tell."""
        server = self.endpoint or f"https://s3.{self.region or 'us-east-1'}.amazonaws.com"
        request = urllib.request.Request(f"{server}/{bucket}", method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                headers = answer.headers
        except urllib.error.HTTPError as error:  # a refusal and a redirect tell the region, too
            headers = error.headers
        except OSError:
            return None
        region: str | None = headers.get("x-amz-bucket-region")
        return region

    def delete_markers(self, bucket: str, keys: Sequence[str]) -> None:
        """Delete objects whose keys end with a slash, which obstore cannot name.

        Consoles of object stores make them to show a folder. Raises BotoCoreError and ClientError.
        """
        client = self.session.create_client(
            "s3", region_name=self.region or "us-east-1", endpoint_url=self.endpoint
        )
        for key in keys:
            client.delete_object(Bucket=bucket, Key=f"{key}/")
