// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IAttestations} from "./interfaces/IAttestations.sol";

contract Attestations is IAttestations {
    mapping(address issuer => mapping(address subject => mapping(bytes32 topic => Attestation))) private _attestations;

    /// @inheritdoc IAttestations
    function attest(address subject, bytes32 topic, bytes32 data, uint40 validUntil, string calldata uri) external {
        if (subject == address(0)) revert Attestations_ZeroAddress();
        if (block.timestamp >= validUntil) revert Attestations_Expired(validUntil, block.timestamp);

        uint32 version = _attestations[msg.sender][subject][topic].version + 1;
        _attestations[msg.sender][subject][topic] =
            Attestation(data, uint40(block.timestamp), validUntil, false, version);

        emit Attested(msg.sender, subject, topic, data, validUntil, version, uri);
    }

    /// @inheritdoc IAttestations
    function revoke(address subject, bytes32 topic) external {
        Attestation storage record = _attestations[msg.sender][subject][topic];
        if (record.version == 0) revert Attestations_Unknown(msg.sender, subject, topic);
        if (record.revoked) revert Attestations_Revoked(msg.sender, subject, topic);

        record.revoked = true;

        emit AttestationRevoked(msg.sender, subject, topic, record.version);
    }

    /// @inheritdoc IAttestations
    function isValid(address issuer, address subject, bytes32 topic) external view returns (bool) {
        Attestation storage record = _attestations[issuer][subject][topic];
        // Of what was never attested `validUntil` is zero.
        return !record.revoked && block.timestamp < record.validUntil;
    }

    /// @inheritdoc IAttestations
    function attestation(address issuer, address subject, bytes32 topic) external view returns (Attestation memory) {
        return _attestations[issuer][subject][topic];
    }
}
