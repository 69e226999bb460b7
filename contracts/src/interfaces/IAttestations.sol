// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

/// @title Facts about workers that issuers vouch for
/// @notice Region, GDPR, SOC 2, the measurement of an enclave: anyone may issue; a client's policy names the issuers that it
/// believes. Nothing here moves money.
/// Warning: an issuer's word is all there is. Nobody checks what is attested, anybody can issue, and an issuer can take its
/// word back at any time: an attestation is worth what its issuer is worth.
interface IAttestations {
    /// @param data Hash of the evidence, or the fact itself when it fits.
    /// @param validUntil Time after which it no longer holds.
    /// @param revoked By its issuer; final for this version.
    /// @param version Rises with each attestation of the same issuer about the same subject and topic.
    struct Attestation {
        bytes32 data;
        uint40 issuedAt;
        uint40 validUntil;
        bool revoked;
        uint32 version;
    }

    error Attestations_ZeroAddress();
    error Attestations_Expired(uint40 validUntil, uint256 now_);
    error Attestations_Unknown(address issuer, address subject, bytes32 topic);
    error Attestations_Revoked(address issuer, address subject, bytes32 topic);

    event Attested(
        address indexed issuer, address indexed subject, bytes32 indexed topic, bytes32 data, uint40 validUntil, uint32 version, string uri
    );
    event AttestationRevoked(address indexed issuer, address indexed subject, bytes32 indexed topic, uint32 version);

    /// @notice The caller vouches for `topic` of `subject`, in place of what it said before.
    /// @param topic keccak256 of a name such as "region:eu".
    /// @param uri Where the evidence can be found; only in the event.
    function attest(address subject, bytes32 topic, bytes32 data, uint40 validUntil, string calldata uri) external;

    /// @notice The caller takes back what it said.
    function revoke(address subject, bytes32 topic) external;

    /// @notice Whether `issuer` vouches now.
    function isValid(address issuer, address subject, bytes32 topic) external view returns (bool);

    function attestation(address issuer, address subject, bytes32 topic) external view returns (Attestation memory);
}
