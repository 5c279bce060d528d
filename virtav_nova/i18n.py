# SPDX-License-Identifier: Apache-2.0
"""Translation of what a user reads."""

import oslo_i18n

_translators = oslo_i18n.TranslatorFactory(domain='virtav_nova')

_ = _translators.primary
