"""What may be published: the release folder, its certificate, its verifier."""

from lightning_dpgen.release.certificate import NotCertifiable
from lightning_dpgen.release.folder import SanitizedRelease, load_release
from lightning_dpgen.release.verify import InvalidRelease, verify_release

__all__ = ["InvalidRelease", "NotCertifiable", "SanitizedRelease", "load_release", "verify_release"]
