"""Shape annotations of jdistill.losses are checked while its tests run."""

import jaxtyping

jaxtyping.install_import_hook("jdistill.losses", "beartype.beartype")
