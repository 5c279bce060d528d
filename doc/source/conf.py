# SPDX-License-Identifier: Apache-2.0

extensions = [
    'openstackdocstheme',
    'oslo_config.sphinxconfiggen',
    'oslo_config.sphinxext',
]

project = 'virtav-nova'
copyright = 'VirtAV contributors'

html_theme = 'openstackdocs'
openstackdocs_auto_name = False
openstackdocs_use_storyboard = False
pygments_style = 'native'

config_generator_config_file = [
    ('../../etc/virtav/virtav-config-generator.conf', '_static/virtav'),
]
